"""`ButcherTableau`, and the one explicit Runge–Kutta step of the package."""

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from grand_fast.solvers.combination import Combination
from grand_fast.solvers.solver import AbstractSolver, Carry, Step, combine
from grand_fast.solvers.term import AbstractTerm


@dataclass(frozen=True)
class ButcherTableau:
    """An explicit method: `y_r = x + tau Σ_{s<r} a_rs f(t + c_s tau, y_s)`, weights `b`.

    Every stage must use the one before it (`a_{r,r-1} ≠ 0`, last `b ≠ 0`): the step relies on it.
    """

    order: int
    a: tuple[tuple[Fraction, ...], ...]  # rows 2…s
    b: tuple[Fraction, ...]

    def __post_init__(self) -> None:
        assert [len(row) for row in self.a] == list(range(1, len(self.b)))
        assert all(row[-1] != 0 for row in (*self.a, self.b))

    @property
    def c(self) -> tuple[Fraction, ...]:
        """Stage times, the row sums of `a`."""
        return (Fraction(0), *(sum(row, Fraction(0)) for row in self.a))

    def in_stage_values(self) -> list[tuple[list[float], float]]:
        """The method written in stage values: per stage, coefficients of `(x, y_2, …)` and of `f`.

        The slopes follow from the stage values, `tau f(y_s) = (y_{s+1} − …) / a_{s+1,s}`, so no
        slope is stored: each new value is a combination of old ones plus one multiple of `f`,
        which is the `axpy` of a term. Exact in rational arithmetic.
        """
        rows = (*self.a, self.b)
        slopes: list[list[Fraction]] = []  # tau f(y_s) in terms of (x, y_2, …, y_{s+1})
        stages = []
        for row in rows:
            base = [Fraction(1)] + [Fraction(0)] * len(slopes)
            for weight, slope in zip(row[:-1], slopes, strict=True):
                for column, value in enumerate(slope):
                    base[column] += weight * value
            stages.append(([float(v) for v in base], float(row[-1])))
            slopes.append([-v / row[-1] for v in base] + [1 / row[-1]])
        return stages


class ExplicitRungeKutta(AbstractSolver):
    """The explicit step of any tableau, without stored slopes."""

    def __init__(self, tableau: ButcherTableau) -> None:
        self.order = tableau.order
        self._times = [float(c) for c in tableau.c]
        self._stages = tableau.in_stage_values()

    def step(self, term: AbstractTerm, t: float, x: Tensor, tau: float, carry: Carry) -> Step:
        """One evaluation of `f` a stage, by the term's `axpy`; nothing is carried on."""
        return Step(self._climb(term, t, tau, [x]))

    def step_from(
        self, term: AbstractTerm, t: float, x: Tensor, slope: Tensor, tau: float
    ) -> Tensor:
        """The new state where `slope = f(t, x)` is known."""
        scale = self._stages[0][1]
        return self._climb(term, t, tau, [x, combine([(1.0, x), (scale * tau, slope)])])

    def _climb(self, term: AbstractTerm, t: float, tau: float, values: list[Tensor]) -> Tensor:
        """The last of the stage values, of which the first are known."""
        known = len(values) - 1
        stages = zip(self._times[known:], self._stages[known:], strict=True)
        for time, (coefficients, scale) in stages:
            pairs = zip(coefficients, values, strict=True)
            base = Combination([(c, y) for c, y in pairs if c != 0.0])
            values.append(term.axpy(t + time * tau, values[-1], base, scale * tau))
        return values[-1]
