"""Linear systems of diffusion, `y − u A y = c`, on a product with A alone: no matrix is formed."""

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from grand_fast.ops import error_ratio
from grand_fast.solvers.combination import Add, Scale
from grand_fast.solvers.solver import combine

Product = Callable[[Tensor, Scale, Add], Tensor]  # (y, scale, add) → scale · A y + Σ c z
LinearSolver = Literal["auto", "fixed_point", "bicgstab"]
# Up to this stiffness the fixed point takes no more products than BiCGSTAB, and no dot products.
_FIXED_POINT_UP_TO = 2.0
_log = logging.getLogger("grand_fast")


@dataclass(frozen=True, eq=False)
class LinearSystem:
    """`(1 + s) y − s A y = (1 + s) c`, solved as `y − u A y = c` with `u = s / (1 + s)`.

    product: of A.
    s:       the stiffness, a float or one value per channel, at least 0.
    c:       a pair, a factor and a tensor.
    """

    product: Product
    s: Scale
    c: tuple[float, Tensor]

    @cached_property
    def u(self) -> Scale:
        """Weight of the product, below 1."""
        return self.s / (1 + self.s)

    @cached_property
    def stiffness(self) -> float:
        """The largest `s` of all channels; of a tensor it is read from the device, once."""
        return float(self.s.max()) if isinstance(self.s, Tensor) else self.s

    def iterate(self, y: Tensor) -> Tensor:
        """`u A y + c`: one step of the fixed point, a convex combination where A's rows are."""
        return self.product(y, self.u, [self.c])

    def apply(self, y: Tensor) -> Tensor:
        """`y − u A y`."""
        return self.product(y, -self.u, [(1.0, y)])


@torch.no_grad()
def solve(system: LinearSystem, y: Tensor, *, tol: float, linear_solver: LinearSolver) -> Tensor:
    """`y` with `‖c − y + u A y‖ ≤ tol ‖c‖`, from a first guess.

    That bounds the error too: by `tol` times the largest `|(1 + s) c|` where the rows of A sum to 1
    at most and none of its entries is negative. A tolerance below half the rounding unit times
    `1 + s` is raised to that. Reads some values from the device. What does not converge, as may be
    with other matrices, is named in a warning.
    """
    if y.numel() == 0:
        return y
    attainable = torch.finfo(y.dtype).eps / 2 * (1 + system.stiffness)
    goal = max(tol, attainable) * _size([system.c])
    if goal == 0.0:
        return torch.zeros_like(y)
    is_narrow = y.dtype in (torch.float16, torch.bfloat16)  # too coarse for BiCGSTAB's recurrences
    if linear_solver == "bicgstab" or (
        linear_solver == "auto" and system.stiffness > _FIXED_POINT_UP_TO and not is_narrow
    ):
        y = _bicgstab(system, y, goal)
    return _fixed_point(system, y, goal)


def _fixed_point(system: LinearSystem, y: Tensor, goal: float) -> Tensor:
    """`y ← u A y + c`. The residual is looked at only about when the goal must be near."""
    before, ahead, products, most = math.nan, 1, 0, 1
    while True:
        for _ in range(ahead):
            previous, y = y, system.iterate(y)
        products += ahead
        residual = _size([(1.0, y), (-1.0, previous)])
        if residual <= goal or not math.isfinite(residual):
            return y
        if products == 1:
            most += _most_products(system, residual / goal, y.numel())
        if products >= most:
            _log.warning(
                "semi_implicit_euler: the linear system stands at %.3g times its tolerance after "
                "%d products. Are the weights that A holds negative, or do its rows sum to more "
                "than 1? Try a smaller step_size.", residual / goal, products,
            )  # fmt: skip
            return y
        # Nan at first, and at least 1 where nothing was gained: look again after one more product
        rate = (residual / before) ** (1 / ahead)
        wanted = math.log(goal / residual) / math.log(rate) if 0 < rate < 1 else 1.0
        ahead = max(1, min(math.ceil(wanted), most - products))
        before = residual


def _most_products(system: LinearSystem, gain: float, elements: int) -> int:
    """Products after which the fixed point has made a residual smaller by the factor `gain`.

    It shrinks by `s / (1 + s)` in the norm in which A is no larger than 1: that of the largest
    element, or of the sum for Aᵀ. The norm used here differs from those by at most `√elements`.
    """
    s = system.stiffness
    if s <= 0:
        return 1
    gain = min(max(gain, 1.0), sys.float_info.max)
    return math.ceil((math.log(gain) + math.log(elements) / 2) / math.log1p(1 / s))


def _bicgstab(system: LinearSystem, y: Tensor, goal: float) -> Tensor:
    """BiCGSTAB on the whole state; the last iterate that is finite, converged or not.

    Reference: van der Vorst, Bi-CGSTAB, SIAM J. Sci. Stat. Comput. 13 (1992).
    """
    r = system.product(y, system.u, [system.c, (-1.0, y)])
    size = _size([(1.0, r)])
    if not math.isfinite(size):
        return y
    shadow, p = r, r
    rho = _dot(shadow, r)
    # Two products an iteration: the fixed point, which always converges, would take no more
    for _ in range(1 + _most_products(system, size / goal, y.numel()) // 2):
        if size <= goal:
            break
        v = system.apply(p)
        step = _ratio(rho, _dot(shadow, v))
        s = combine([(1.0, r), (-step, v)])
        t = system.apply(s)
        omega = _ratio(_dot(t, s), t.numel() * _size([(1.0, t)]) ** 2)
        r = combine([(1.0, s), (-omega, t)])
        size = _size([(1.0, r)])
        if not math.isfinite(size):
            break
        y = combine([(1.0, y), (step, p), (omega, s)])
        if omega == 0.0 or step == 0.0:
            break  # a breakdown, or s = 0 and y the solution
        rho, last = _dot(shadow, r), rho
        beta = _ratio(rho, last) * step / omega
        if not math.isfinite(beta):
            break
        p = combine([(1.0, r), (beta, p), (-beta * omega, v)])
    return y


def _ratio(above: float, below: float) -> float:
    return above / below if below != 0.0 else 0.0


def _dot(x: Tensor, y: Tensor) -> float:
    wide = torch.promote_types(x.dtype, torch.float32)
    return float(torch.dot(x.flatten().to(wide), y.flatten().to(wide)))


def _size(terms: list[tuple[float, Tensor]]) -> float:
    """Root mean square of `Σ c y`, in one pass."""
    y = terms[0][1]
    return float(error_ratio(terms, y, y, rtol=0.0, atol=1.0))
