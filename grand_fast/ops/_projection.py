"""Projections of a state, `x Wᵀ + b`, with the CPU's own products where they run."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from grand_fast.ops._checks import inner_contiguous
from grand_fast.ops._dispatch import projection, transforms_active


def differentiable_projection(x: Tensor, weight: Tensor, bias: Tensor, name: str) -> Tensor:
    """`project`, differentiable."""
    if name != "cpu" or torch.compiler.is_compiling() or transforms_active():
        return functional.linear(x, weight, bias)
    return _ProjectionFunction.apply(x, weight, bias)  # type: ignore[no-any-return]


class _ProjectionFunction(Function):
    """The CPU's own products: of few channels they take half the time of a library's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return projection().project(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return dy @ weight, dy.t() @ x, dy.sum(0)
        dy = inner_contiguous(dy)
        needs_dx, *needs_parameters = ctx.needs_input_grad
        dx = projection().input_gradient(dy, weight) if needs_dx else None
        if not any(needs_parameters):
            return dx, None, None
        return dx, *projection().parameter_gradients(dy, x)


def project(x: Tensor, weight: Tensor, bias: Tensor, name: str) -> Tensor:
    """q and k, side by side, `[N, 2·d_att]`."""
    if name == "cpu":
        return projection().project(x, weight, bias)  # type: ignore[no-any-return]
    return functional.linear(x, weight, bias)


def add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor, name: str) -> None:
    """`dx += dy weight`, in place."""
    if name == "cpu":
        projection().add_input_gradient(dx, dy, weight)
    else:
        dx.addmm_(dy, weight)


def parameter_gradients(dy: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias."""
    if name == "cpu":
        return projection().parameter_gradients(dy, x)  # type: ignore[no-any-return]
    return dy.t() @ x, dy.sum(0)
