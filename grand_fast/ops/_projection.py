"""Projections of a state, `x Wᵀ + b`, with the CPU's own products where they run."""

from torch import Tensor
from torch.nn import functional

from grand_fast.ops.backends import projection


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
