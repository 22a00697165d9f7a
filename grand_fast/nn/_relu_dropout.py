"""`dropout(relu(x))` that keeps its result alone for backward, a third of what the two keep.

On the CPU it lies where the kernels' results do: what torch allocates for it and for the draws
would stay with the process, unused, once backward begins.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from grand_fast.ops import stage_update
from grand_fast.ops.backends import is_batched, result_like, transforms_active


def relu_dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """As its two parts, draws included: where the result is 0, so is the gradient."""
    if not training or not 0.0 < p < 1.0 or torch.compiler.is_compiling() or transforms_active():
        return functional.dropout(torch.relu(x), p, training)
    y: Tensor = _ReluDropoutFunction.apply(x, p)  # type: ignore[no-untyped-call]
    return y


class _ReluDropoutFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        if x.is_cpu and x.is_contiguous():  # in another order it would draw other numbers
            y = torch.clamp_min(x, 0.0, out=result_like(x))
            y.mul_(result_like(x).bernoulli_(1.0 - p).div_(1.0 - p))
        else:
            y = functional.dropout(torch.relu(x), p, training=True, inplace=True)
        ctx.save_for_backward(y)
        ctx.p = p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if is_batched(dy):
            return (dy / (1.0 - ctx.p)).masked_fill(y <= 0.0, 0.0), None
        return stage_update([(1.0 / (1.0 - ctx.p), dy)]).masked_fill_(y <= 0.0, 0.0), None
