"""Runge–Kutta pairs that estimate their error, and the state between the ends of their steps."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor

from grand_fast.ops import error_ratio
from grand_fast.ops.step_updates import StepUpdates
from grand_fast.solvers.methods.runge_kutta import ButcherTableau
from grand_fast.solvers.solver import AbstractAdaptiveSolver, Carry, Step, combine
from grand_fast.solvers.step_control import Norm, rms_norm
from grand_fast.solvers.term import AbstractTerm


@dataclass(frozen=True)
class EmbeddedPair:
    """A tableau, the weights of its error estimate and of the state at half a step.

    tableau: of the solution that is kept.
    error:   weights of the slopes; one more than stages where the first slope of the next step
             takes part (`is_fsal`).
    middle:  weights of the slopes that give the state at `t + tau / 2`, to the pair's order.
    is_fsal: the slope at the end of a step is the first of the next.
    """

    tableau: ButcherTableau
    error: tuple[Fraction, ...]
    middle: tuple[float, ...]
    is_fsal: bool = True


class EmbeddedRungeKutta(AbstractAdaptiveSolver):
    """The step of a pair. Slopes are kept, so that each stage is one combination of them.

    Unlike the fixed-step methods it does not write stages in terms of stage values: their
    coefficients would multiply the rounding errors, of which the error estimate is made.

    Args:
        rtol, atol: tolerances of the error: floats, or tensors like the state.
        norm: of the error over its tolerance; by default the root mean square, in one fused pass.
        parts: of a flat state; the largest of their root mean squares counts, each in such a pass.
    """

    # Of one solve: slopes are those of `rest`, less than f by `constant`.
    rest: AbstractTerm | None = None
    constant: Tensor | None = None

    def __init__(
        self,
        pair: EmbeddedPair,
        *,
        rtol: float | Tensor,
        atol: float | Tensor,
        norm: Norm | None = None,
        parts: Sequence[slice] = (),
    ) -> None:
        self.order = pair.tableau.order
        self.pair, self.rtol, self.atol, self.norm, self.parts = pair, rtol, atol, norm, parts
        self._values = pair.tableau.in_stage_values()
        self._a = [[float(v) for v in row] for row in pair.tableau.a]
        self._b = [float(v) for v in pair.tableau.b]
        self._c = [float(v) for v in pair.tableau.c]
        self._error = [float(v) for v in pair.error]

    def of(self, term: AbstractTerm) -> Self:
        """For one solve of `term`: with what it adds to f at all times left out of the slopes."""
        own = copy(self)
        own.rest, own.constant = term.split_constant()
        return own

    def start(self, term: AbstractTerm, t: float, x: Tensor) -> Carry:
        """The slope at the start."""
        return ((self.rest or term).vf(t, x),)

    def slope(self, carry: Carry) -> Tensor:
        """f at the start of a step, without a graph."""
        known = [(1.0, carry[0].detach())]
        return combine(known if self.constant is None else [*known, (1.0, self.constant.detach())])

    def step(self, term: AbstractTerm, t: float, x: Tensor, tau: float, carry: Carry) -> Step:
        """Slopes of the stages, the new state, its slope if it is the next step's first."""
        y, slopes = self.stages(term, t, x, tau, carry)
        if self.pair.is_fsal:
            slopes.append((self.rest or term).vf(t + tau, y))
        return self.taken(x, y, tau, slopes)

    def stages(
        self, term: AbstractTerm, t: float, x: Tensor, tau: float, carry: Carry
    ) -> tuple[Tensor, list[Tensor]]:
        """The new state and the slopes that it is made of."""
        term = self.rest or term
        slopes, update = [carry[0]], StepUpdates()

        def moved(row: list[float]) -> Tensor:
            used = [(tau * a, f) for a, f in zip(row, slopes, strict=True) if a != 0.0]
            return update([(1.0, x), *self._constant_of(tau * sum(row)), *used])

        for row, time in zip(self._a, self._c[1:], strict=True):
            slopes.append(term.vf(t + time * tau, moved(row)))
        return moved(self._b), slopes

    def stages_again(
        self, term: AbstractTerm, t: float, x: Tensor, tau: float, slopes: list[Tensor]
    ) -> None:
        """The evaluations of `stages`, for what they save for backward: the stage values above all.

        Written in terms of those, so that no slope is held beside them: `slopes` has the first, and
        is emptied. Their coefficients, up to 17, multiply rounding errors, of which no error
        estimate is made here.
        """
        term, values = self.rest or term, [x]
        for time, (coefficients, scale) in zip(self._c[1:], self._values, strict=False):
            pairs = zip(coefficients, values, strict=True)
            known = [(c, y) for c, y in pairs if c != 0.0]
            known += self._constant_of(scale * tau)
            values.append(combine([*known, (scale * tau, slopes.pop())]))
            slopes.append(term.vf(t + time * tau, values[-1]))

    def taken(self, x: Tensor, y: Tensor, tau: float, slopes: list[Tensor]) -> Step:
        """The step from `x` to `y` by all its slopes."""
        return Step(y, (slopes[-1],), tuple(slopes), self._ratio(x, y, tau, slopes))

    def interpolate(self, x: Tensor, step: Step, tau: float, theta: float) -> Tensor:
        """A quartic through both ends, their slopes and the state at half a step."""
        if theta in (0.0, 1.0):
            return x if theta == 0.0 else step.x
        z = theta
        # Values of the quartic's basis: x, x', middle, y, y'.
        own = 1 + z**2 * (-11 + z * (18 - 8 * z))
        own_slope = z * (1 + z * (-4 + z * (5 - 2 * z)))
        middle = z**2 * (16 + z * (-32 + 16 * z))
        new = z**2 * (-5 + z * (14 - 8 * z))
        new_slope = z**2 * (1 + z * (-3 + 2 * z))
        weights = [middle * m for m in self.pair.middle]
        weights[0] += own_slope
        weights[-1] += new_slope
        terms = [(own + middle, x), (new, step.x)]
        terms += [(tau * w, f) for w, f in zip(weights, step.slopes, strict=True)]
        return combine([*terms, *self._constant_of(tau * sum(weights))])

    def _constant_of(self, scale: float) -> list[tuple[float, Tensor]]:
        return [] if self.constant is None else [(scale, self.constant)]

    def _ratio(self, x: Tensor, y: Tensor, tau: float, slopes: list[Tensor]) -> Tensor:
        # The weights of an error add up to 0: what all slopes leave out counts for nothing.
        terms = [(tau * e, f) for e, f in zip(self._error, slopes, strict=True) if e != 0.0]
        rtol, atol = self.rtol, self.atol
        with torch.no_grad():
            if self.norm is None and isinstance(rtol, float) and isinstance(atol, float):
                if not self.parts:
                    return error_ratio(terms, x, y, rtol=rtol, atol=atol)
                ratios = [
                    error_ratio([(c, f[p]) for c, f in terms], x[p], y[p], rtol=rtol, atol=atol)
                    for p in self.parts
                ]
                return torch.stack(ratios).amax()
            tolerance = atol + rtol * torch.maximum(x.abs(), y.abs())
            return (self.norm or rms_norm)(combine(terms) / tolerance)
