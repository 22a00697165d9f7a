"""A memory check for Triton's interpreter, which itself reads and writes any address it gets."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime import interpreter


@contextmanager
def checked_memory() -> Iterator[None]:
    """Within the block, a kernel fails that leaves its tensors, or writes one element twice.

    Every lane that is not masked must lie inside a tensor of the launch; no two lanes and no two
    programs may store to one address; no program may load what another one stores.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "set_grid_idx")
    saved = {name: getattr(builder, name) for name in names}
    init = executor._init_args_hst
    launch = _Launch()

    def start(self, args, kwargs):
        host_args, host_kwargs = init(self, args, kwargs)
        launch.start([*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()])
        return host_args, host_kwargs

    def load(self, pointer, mask, *rest):
        launch.load(pointer, mask)
        return saved["create_masked_load"](self, pointer, mask, *rest)

    def store(self, pointer, value, mask, *rest):
        launch.store(pointer, mask)
        return saved["create_masked_store"](self, pointer, value, mask, *rest)

    def set_program(self, x, y, z):
        launch.program = x
        saved["set_grid_idx"](self, x, y, z)

    executor._init_args_hst = start
    for name, function in zip(names, (load, store, set_program), strict=True):
        setattr(builder, name, function)
    try:
        yield
    finally:
        executor._init_args_hst = init
        for name, function in saved.items():
            setattr(builder, name, function)


class _Launch:
    """The tensors of the launch that runs, and which program stored and loaded each address."""

    def start(self, arguments):
        spans = []
        for name, value in _flat(arguments):
            if torch.is_tensor(value) and value.numel():
                steps = zip(value.shape, value.stride(), strict=True)
                size = sum((n - 1) * stride for n, stride in steps) + 1
                begin = value.data_ptr()
                spans.append((begin, begin + size * value.element_size(), name))
        spans.sort()
        self.begin = np.array([s[0] for s in spans], dtype=np.uint64)
        self.end = np.array([s[1] for s in spans], dtype=np.uint64)
        self.names = [s[2] for s in spans]
        self.stored, self.loaded = {}, {}
        self.program = 0

    def load(self, pointer, mask):
        for address in self._addresses("load", pointer, mask):
            if self.stored.get(address, self.program) != self.program:
                raise AssertionError(f"load of {self._name(address)}: another program stores it")
            first = self.loaded.setdefault(address, self.program)
            if first != self.program:
                self.loaded[address] = -1  # several programs

    def store(self, pointer, mask):
        for address in self._addresses("store", pointer, mask):
            if address in self.stored:
                raise AssertionError(f"store to {self._name(address)}: it was stored before")
            if self.loaded.get(address, self.program) != self.program:
                raise AssertionError(f"store to {self._name(address)}: another program loads it")
            self.stored[address] = self.program

    def _addresses(self, what, pointer, mask):
        on = np.asarray(mask.data, dtype=bool)
        address = np.broadcast_to(np.asarray(pointer.data), on.shape)[on].ravel()
        if address.size == 0:
            return []
        size = np.uint64(pointer.get_element_ty().primitive_bitwidth // 8)
        span = np.searchsorted(self.begin, address, "right").astype(np.int64) - 1
        outside = (span < 0) | (address + size > self.end[np.maximum(span, 0)])
        if outside.any():
            near = self._name(int(address[outside][0]))
            raise AssertionError(f"{what}: {int(outside.sum())} lanes out of bounds, near {near}")
        return address.tolist()

    def _name(self, address):
        span = int(np.searchsorted(self.begin, np.uint64(address), "right")) - 1
        return f"`{self.names[max(span, 0)]}` + {address - int(self.begin[max(span, 0)])} bytes"


def _flat(arguments):
    """Name and value of each argument, those inside of tuples too."""
    for name, value in arguments:
        if isinstance(value, tuple):
            yield from _flat((name, v) for v in value)
        else:
            yield name, value
