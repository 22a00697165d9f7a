"""Adjoint "auto": steps keep what their stages save while there is room, then checkpoints."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from grand_fast.ops.backends import free_memory
from grand_fast.ops.calls import recompute
from grand_fast.solvers.gradients.checkpoint import Take, run_again
from grand_fast.solvers.solver import Carry

T = TypeVar("T")

_SHARE = 1 / 4  # of what is free when a solve begins
_STATES_OF_A_STEP = 16  # that a step may be expected to keep, before one was measured
# Of one tensor: less is kept, since to compute it again takes longer; more comes in memory fresh
# from the system, whose pages cost as much.
_KEPT_PROJECTION = 16 << 20


class Saved:
    """What autograd saves in a block: bytes, each piece of memory once.

    Leaves that want gradients are there anyway, but for `x`, and so is `own`.
    """

    def __init__(self, x: Tensor | None = None, *, own: Sequence[Tensor] = ()) -> None:
        self._bytes: dict[int, int] = {}
        self._x = None if x is None else _memory_of(x)[0]
        self._own = {_memory_of(t)[0] for t in own}
        self.hooks = saved_tensors_hooks(self._pack, _unpacked)

    @property
    def bytes(self) -> int:
        """Their sum."""
        return sum(self._bytes.values())

    def _pack(self, t: Tensor) -> tuple[Tensor, int]:
        place, size = _memory_of(t)
        is_there = t.is_leaf and t.requires_grad and place != self._x
        if not is_there and place not in self._own:
            self._bytes[place] = size
        return t.detach(), t._version  # itself it would keep its own graph alive


class Room:
    """What the steps of one solve from a state like `x` may keep for backward.

    The first step is measured.
    """

    def __init__(self, x: Tensor) -> None:
        size = max(x.numel() * x.element_size(), 1)
        self._limit = _KEPT_PROJECTION / size
        self._step, self._is_measured = _STATES_OF_A_STEP * size, False
        self._left = _SHARE * free_memory(x.device)
        self._start: Tensor | None = None  # of the last attempt at a step
        self.lasts = True  # whether all steps so far had room

    @staticmethod
    def of(x: Tensor) -> "Room | None":
        """None where nobody can say what a step keeps: in a program, or where others keep it."""
        if torch.compiler.is_compiling():
            return None
        is_hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return None if is_hooked else Room(x)

    def is_left(self, x: Tensor) -> bool:
        """Whether the step from `x` may keep what it saves; once one may not, no other may."""
        if x is self._start:  # the last attempt did not count, and kept nothing
            self._left, self._start = self._left + self._step, None
        self.lasts = self._left >= self._step
        return self.lasts

    def take(self, x: Tensor, step: Callable[..., T], *given: Any) -> T:
        """`step(*given)` from `x`, which keeps what it saves."""
        with recompute(self._limit):
            if self._is_measured:
                taken = step(*given)
            else:
                saved = Saved(x)
                with saved.hooks:
                    taken = step(*given)
                self._step, self._is_measured = saved.bytes, True
        self._left, self._start = self._left - self._step, x
        return taken

    def differentiate(self, step: Take, x: Tensor, carry: Carry) -> Any:
        """Directly while there is room, by a checkpoint after that."""
        return self.take(x, step, x, carry) if self.is_left(x) else run_again(step, x, carry)


def _memory_of(t: Tensor) -> tuple[int, int]:
    """What tells a tensor's memory from others', and its bytes."""
    try:
        storage = t.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # sparse, or a wrapper of others
        count = t.numel() if t.layout is torch.strided else t._nnz()
        return id(t), count * t.element_size()


def _unpacked(packed: tuple[Tensor, int]) -> Tensor:
    t, version = packed
    if t._version != version:  # which autograd looks for where there are no hooks
        raise RuntimeError(
            "integrate: what a step saved for backward must stay as it was, and has been modified "
            "by an inplace operation. Change parameters after backward()."
        )
    return t
