"""The projections of a state to q and k, `x Wᵀ + b`: with the CPU's own products where they run."""

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from grand_fast.ops.backends import projection


def packed_projection(weight: Tensor, bias: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """`x [N, d]` → q and k, side by side, `[N, 2·d_att]`; the weights are packed once."""
    if name == "cpu":
        return projection().Projection(weight, bias)  # type: ignore[no-any-return]
    return lambda x: functional.linear(x, weight, bias)


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


def absorbed(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """q̃ = W_kᵀ (W_q x + b_q) and x in place of the keys, `[N, 1, d]`; equal up to a row's constant.

    The kernel divides by √d where √d_att is due.
    """
    (w_q, w_k), b_q = weight.chunk(2), bias.chunk(2)[0]
    scale = math.sqrt(w_k.shape[1] / w_k.shape[0])
    q = functional.linear(x, scale * (w_k.t() @ w_q), scale * (w_k.t() @ b_q))
    return q.unsqueeze(1), x.unsqueeze(1)
