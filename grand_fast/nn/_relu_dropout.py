"""`dropout(relu(x))` that keeps its result alone for backward, a third of what the two keep."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from grand_fast.ops import stage_update
from grand_fast.ops._dispatch import transforms_active


def relu_dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """As its two parts, draws included: where the result is 0, so is the gradient."""
    if not training or not 0.0 < p < 1.0 or torch.compiler.is_compiling() or transforms_active():
        return functional.dropout(torch.relu(x), p, training)
    y: Tensor = _ReluDropoutFunction.apply(x, p)  # type: ignore[no-untyped-call]
    return y


class _ReluDropoutFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        y = functional.dropout(torch.relu(x), p, training=True, inplace=True)
        ctx.save_for_backward(y)
        ctx.p = p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return stage_update([(1.0 / (1.0 - ctx.p), dy)]).masked_fill_(y <= 0.0, 0.0), None
