"""Uniformisation: the exact solution of linear diffusion, a Poisson average of powers of A."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from grand_fast.solvers.checks import check_share
from grand_fast.solvers.combination import Scale
from grand_fast.solvers.solver import AbstractSolver, Carry, Step, combine
from grand_fast.solvers.term import AbstractLinearTerm, AbstractTerm

# Of `q` in a step, whose weights then take a few MB; more steps take 4 % more products at most.
_LARGEST_MEAN = 2.0**16


class Uniformisation(AbstractSolver):
    """The exact state after any time, for linear terms.

    `x(T) = Σ_k [Pois(k; q) A^k x0 + (beta / alpha) P(N_q > k) A^k s]` with `q = alpha T`, `s` the
    source and `N_q` a Poisson variable of mean `q`. No weight of `x0` is negative and their sum is
    1: the maximum principle holds. Horner's rule takes one product a power; their number is known
    beforehand, some `q + 5 √q + 5` in float32, `q + 8 √q + 10` in float64. A step of `q` above
    65536 is taken in several, each exact.

    Args:
        tol: what the powers left out may add, over the largest of `|x0|` and of `T |beta s|`. By
            default the spacing of numbers at 1 in the state's type.

    `alpha` is a float or a scalar tensor, at least 0; a tensor is read from the device once a step
    and once a solve.
    Differentiable by `x0`, `s`, the entries of A, `alpha` and `beta`. Autograd keeps one state a
    product; with adjoint `"checkpoint"` those of one step at a time.
    Reference: GRAND (Chamberlain et al. 2021), equation 11 with constant A, solved.
    """

    order = 1
    wants_matrix = True
    is_exact = True

    def __init__(self, tol: float | None = None) -> None:
        if tol is not None:
            check_share("Uniformisation", "tol", tol)
        self.tol = tol

    def longest_step(self, term: AbstractTerm) -> float:
        """That of the largest `q`."""
        alpha = _diffusivity(term.linear().alpha)
        return _LARGEST_MEAN / alpha if 0 < alpha < math.inf else math.inf

    def step(self, term: AbstractTerm, t: float, x: Tensor, tau: float, carry: Carry) -> Step:
        """One product a power of A, the highest first."""
        linear = term.linear()
        q = tau * _diffusivity(linear.alpha)
        if not math.isfinite(q):
            return Step(x * q)  # which is not finite either
        weights, source_weights = poisson_weights(
            q, torch.finfo(x.dtype).eps if self.tol is None else self.tol
        )
        is_short = q < math.sqrt(torch.finfo(x.dtype).eps)
        is_variable = isinstance(linear.alpha, Tensor) and linear.alpha.requires_grad
        by_alpha = is_variable and torch.is_grad_enabled()
        factor, source = _source(linear, x, through_alpha=by_alpha and not is_short)

        def added(k: int) -> list[tuple[float, Tensor]]:
            pairs = [(weights[k], x)]
            if source is not None:
                pairs.append((tau * source_weights[k] * factor, source))
            return [pair for pair in pairs if pair[0] != 0.0]  # some underflow

        highest = len(weights) - 1
        if highest == 0:
            y = combine(added(0))
        else:  # the highest power has no source
            y = linear.product(x, weights[-1], added(highest - 1))
            for k in range(highest - 2, -1, -1):
                y = linear.product(y, 1.0, added(k))
        if by_alpha:
            slope = _slope_by_alpha(linear, t + tau, y.detach(), tau, is_short=is_short)
            y = _SlopeFunction.apply(y, linear.alpha, slope)
        return Step(y)


@lru_cache(maxsize=256)
def poisson_weights(q: float, tol: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`Pois(k; q)` and `P(N_q > k) / q` for `k = 0 … K`, the least K that leaves out at most `tol`.

    Of either sum. The first is then scaled to 1. From the mode outwards and from the end of the
    tail, so that every value is a product or sum of positive numbers, exact to rounding times k.
    """
    if q < np.finfo(np.float64).tiny:
        return (1.0,), (1.0,)
    log = 7 - math.log(tol)  # Bernstein's bound of the tail: a thousandth of tol
    end = math.ceil(q + log / 3 + math.sqrt((log / 3) ** 2 + 2 * log * q)) + 2
    mode = int(q)
    with np.errstate(under="ignore"):
        above = np.cumprod(q / np.arange(mode + 1, end + 1))
        below = np.cumprod(np.arange(mode, 0, -1) / q)[::-1]
        weights = np.concatenate([below, [1.0], above])
        weights /= weights.sum()
        tail = _sums_after(weights)
        source_left_out = (tail + _sums_after(tail)) / q
        highest = int(np.argmax(np.maximum(tail, source_left_out) <= tol))
        weights = weights[: highest + 1] / weights[: highest + 1].sum()
        source_weights = _sums_after(weights) / q
    return tuple(weights.tolist()), tuple(source_weights.tolist())


def _sums_after(values: Any) -> Any:
    """`Σ_{j>k} values_j` for each k."""
    return np.concatenate([np.cumsum(values[:0:-1])[::-1], [0.0]])


def _diffusivity(alpha: Scale) -> float:
    if isinstance(alpha, Tensor) and alpha.numel() != 1:
        raise NotImplementedError(
            f"integrate: `alpha` must be one value for all channels for uniformisation, got "
            f"{list(alpha.shape)}. Use semi_implicit_euler or dopri5."
        )
    value = float(alpha.detach()) if isinstance(alpha, Tensor) else float(alpha)
    if value < 0:
        raise ValueError(f"integrate: `alpha` must be at least 0 for uniformisation, got {value}.")
    return value


def _source(
    term: AbstractLinearTerm, x: Tensor, *, through_alpha: bool
) -> tuple[float, Tensor | None]:
    """`beta source`, a factor and a tensor; `through_alpha`: its gradient is `−1/alpha` of it.

    Which is how `beta / alpha` depends on alpha.
    """
    beta, source, alpha = term.beta, term.source, term.alpha
    if beta is None or source is None:
        return 1.0, None
    if through_alpha and isinstance(alpha, Tensor):
        beta = beta * (alpha.detach() / alpha)
    if isinstance(beta, Tensor):
        return 1.0, (beta * source).to(x.dtype)
    return beta, source


@torch.no_grad()
def _slope_by_alpha(
    term: AbstractLinearTerm, t: float, y: Tensor, tau: float, *, is_short: bool
) -> Tensor:
    """`∂x(T)/∂alpha` with `beta / alpha` held: `T ((A − I) x(T) + (beta / alpha) s)`.

    As alpha goes to 0 that and the share of `beta / alpha` cancel; together they are then
    `T (A − I) (x(T) − beta T s / 2)`, to a relative error of `alpha T`.
    """
    if not is_short:
        return combine([(tau / _diffusivity(term.alpha), term.vf(t, y))])
    factor, source = _source(term, y, through_alpha=False)
    if source is not None:
        y = combine([(1.0, y), (-0.5 * tau * factor, source)])
    return term.product(y, tau, [(-tau, y)])


class _SlopeFunction(Function):
    """`y`, whose derivative by the scalar `alpha` is `slope`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, alpha: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(alpha, slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        alpha, slope = ctx.saved_tensors
        wide = torch.promote_types(dy.dtype, torch.float32)
        dalpha = (dy.to(wide) * slope.to(wide)).sum()
        return dy, dalpha.to(alpha.dtype).reshape(alpha.shape), None
