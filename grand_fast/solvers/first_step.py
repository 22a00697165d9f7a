"""The first step of an adaptive solve, by the rule of Hairer, Nørsett and Wanner."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grand_fast.ops import error_ratio
from grand_fast.solvers.solver import combine
from grand_fast.solvers.term import AbstractTerm

Norm = Callable[[Tensor], Tensor]


def rms_norm(x: Tensor) -> Tensor:
    """Root mean square over all elements."""
    return x.square().mean().sqrt()


@torch.no_grad()
def first_step(
    term: AbstractTerm,
    t: float,
    x: Tensor,
    slope: Tensor,
    *,
    order: int,
    rtol: float | Tensor,
    atol: float | Tensor,
    norm: Norm | None = None,
) -> float:
    """A step whose error is about a hundredth of the tolerance; evaluates `f` once.

    Reference: Hairer, Nørsett, Wanner, Solving Ordinary Differential Equations I, II.4.
    """
    if x.numel() == 0:
        return 1.0

    def size(*terms: tuple[float, Tensor]) -> float:
        if norm is None and isinstance(rtol, float) and isinstance(atol, float):
            return float(error_ratio(terms, x, x, rtol=rtol, atol=atol))
        return float((norm or rms_norm)(combine([*terms]) / (atol + x.abs() * rtol)))

    d0, d1 = size((1.0, x)), size((1.0, slope))
    if not math.isfinite(d0 + d1):
        return 1.0  # as good as any: the steps will say what is wrong
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    later = term.vf(t + h0, combine([(1.0, x), (h0, slope)]))
    d2 = size((1.0, later), (-1.0, slope)) / h0
    if not math.isfinite(d2):
        return h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        return min(100 * h0, max(1e-6, h0 * 1e-3))
    h1: float = (0.01 / max(d1, d2)) ** (1 / order)
    return min(100 * h0, h1)
