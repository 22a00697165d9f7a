"""What the explicit and the implicit Adams methods share: coefficients, history and start."""

from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from grand_fast.solvers.methods.runge_kutta import ExplicitRungeKutta
from grand_fast.solvers.methods.tableaux import THREE_EIGHTHS
from grand_fast.solvers.solver import AbstractSolver, Carry, Step, combine
from grand_fast.solvers.term import AbstractTerm

TRUE_ORDER = 4
# torchdiffeq's: from how many evaluations on it takes a multistep, and its highest order
_RAMP_FROM, _HIGHEST = 3, 12
# Grid points are rounded: lengths that differ by less than this share are one step size.
_ROUNDING = 1e-8
_START = ExplicitRungeKutta(THREE_EIGHTHS)


@lru_cache
def bashforth(order: int) -> tuple[float, ...]:
    """`β` of `x' = x + tau Σ_i β_i f_{n−i}`, explicit, newest evaluation first."""
    return _integrals([-i for i in range(order)])


@lru_cache
def moulton(order: int) -> tuple[float, ...]:
    """`β` of `x' = x + tau Σ_i β_i f_{n+1−i}`, implicit, newest evaluation first."""
    return _integrals([1 - i for i in range(order)])


def _integrals(nodes: Sequence[int]) -> tuple[float, ...]:
    """`∫_0^1` of each Lagrange polynomial on `nodes`, in exact arithmetic until the end."""
    weights = []
    for own in nodes:
        polynomial = [Fraction(1)]  # its coefficients, from the constant up
        for other in nodes:
            if other != own:  # times (s − other) / (own − other)
                shifted = [Fraction(0), *polynomial]
                scaled = [*(other * c for c in polynomial), Fraction(0)]
                polynomial = [(a - b) / (own - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(float(sum(c / (power + 1) for power, c in enumerate(polynomial))))
    return tuple(weights)


class AbstractAdams(AbstractSolver):
    """A multistep method on equal steps, whose evaluations travel in the carry, newest first.

    Of order 4 it starts with three steps of `rk4`, and takes one wherever the step size changes,
    as at a last step that is cut: what it knows then lies elsewhere than its coefficients assume.
    With `max_order = m` it is torchdiffeq's: from the third step on it uses what evaluations there
    are, up to m − 1, as if all steps were as long as this one.
    """

    holds_slopes = True

    order = TRUE_ORDER

    def __init__(self, name: str, max_order: int | None) -> None:
        if max_order is not None:
            if isinstance(max_order, bool) or not isinstance(max_order, int):
                got = type(max_order).__name__
                raise TypeError(f"{name}: `max_order` must be an int or None, got {got}.")
            if not _RAMP_FROM < max_order <= _HIGHEST:
                raise ValueError(
                    f"{name}: `max_order` must be from {_RAMP_FROM + 1} to {_HIGHEST}, "
                    f"got {max_order}. Use rk4 for less."
                )
        self.ramps = max_order is not None
        self.top = max_order or TRUE_ORDER  # of the corrector
        self._least = _RAMP_FROM if self.ramps else TRUE_ORDER
        self._most = self.top - 1 if self.ramps else TRUE_ORDER

    def step(self, term: AbstractTerm, t: float, x: Tensor, tau: float, carry: Carry) -> Step:
        """One evaluation, and what the method makes of it and of those before."""
        f = term.vf(t, x)
        history = (f, *self._past(carry, tau))[: self._most]
        if len(history) < self._least:
            x = _START.step_from(term, t, x, f, tau)
        else:
            x, history = self._advance(term, t, x, tau, history)
        return Step(x, self._remember(history, tau))

    @abstractmethod
    def _advance(
        self, term: AbstractTerm, t: float, x: Tensor, tau: float, history: Carry
    ) -> tuple[Tensor, Carry]:
        """The new state, and what of the history to keep."""

    def _past(self, carry: Carry, tau: float) -> Carry:
        if self.ramps or not carry:
            return carry
        spacing, *past = carry
        return tuple(past) if abs(float(spacing) - tau) <= _ROUNDING * tau else ()

    def _remember(self, history: Carry, tau: float) -> Carry:
        past = history[: self._most - 1]
        # On the host, where reading it stalls nothing
        return past if self.ramps else (torch.tensor(tau, dtype=torch.float64), *past)


def predict(x: Tensor, tau: float, history: Carry) -> Tensor:
    """The explicit step of as many evaluations as there are."""
    return weighted(x, tau, bashforth(len(history)), history)


def weighted(x: Tensor, tau: float, weights: Sequence[float], history: Carry) -> Tensor:
    """`x + tau Σ_i weights_i history_i`, over as many as there are weights."""
    pairs = zip(weights, history[: len(weights)], strict=True)
    return combine([(1.0, x), *((tau * w, f) for w, f in pairs)])
