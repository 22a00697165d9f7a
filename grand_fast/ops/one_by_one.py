"""Gradients of a batch, as `is_grads_batched` and `vectorize=True` ask for: one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from grand_fast.ops.backends import batch_level, outside_transforms

Found = Sequence[Tensor | None]


def one_by_one(function: Callable[..., Found], *grads: Tensor) -> Found:
    """`function(*grads)`, tensors and None; where torch maps over gradients, of each of them.

    Kernels take plain tensors, and `function` is given no other.
    """
    level = batch_level()
    if level > 0:
        # Of one that is not mapped torch makes a batch of 1
        rows = [torch._remove_batch_dim(t, level, 1, 0) for t in grads]
        size = max(t.shape[0] for t in rows)
        with outside_transforms():
            found = _stacked(function, [t.expand(size, *t.shape[1:]) for t in rows])
        return [None if t is None else torch._add_batch_dim(t, 0, level) for t in found]
    there: list[bool] = []

    def run(*grads: Tensor) -> tuple[Tensor, ...]:
        found = function(*grads)
        there[:] = [t is not None for t in found]
        return tuple(t for t in found if t is not None)

    results = iter(_OneByOneFunction.apply(run, *grads))
    return [next(results) if is_there else None for is_there in there]


class _OneByOneFunction(Function):
    """Under the maps of torch.func."""

    @staticmethod
    def forward(run: Callable[..., tuple[Tensor, ...]], *grads: Tensor) -> tuple[Tensor, ...]:
        return run(*grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # what is differentiated again takes another way

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Any, *grads: Tensor) -> tuple[Any, Any]:
        rows = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(grads, in_dims[1:], strict=True)
        ]
        found = _stacked(lambda *row: _OneByOneFunction.apply(run, *row), rows)
        return tuple(found), (0,) * len(found)


def _stacked(function: Callable[..., Found], rows: Sequence[Tensor]) -> Found:
    """What `function` makes of each row, one axis more."""
    found = [function(*row) for row in zip(*(t.unbind(0) for t in rows), strict=True)]
    return [None if of[0] is None else torch.stack(of) for of in zip(*found, strict=True)]
