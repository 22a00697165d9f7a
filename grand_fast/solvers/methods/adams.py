"""Adams–Bashforth and Adams–Moulton, the multistep methods: coefficients, history and steps."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from grand_fast.solvers.checks import check_int
from grand_fast.solvers.combination import Combination
from grand_fast.solvers.methods.runge_kutta import ExplicitRungeKutta
from grand_fast.solvers.methods.tableaux import THREE_EIGHTHS
from grand_fast.solvers.solver import AbstractSolver, Carry, Step, combine
from grand_fast.solvers.term import AbstractTerm

_TRUE_ORDER = 4
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


class _AbstractAdams(AbstractSolver):
    """A multistep method on equal steps, whose evaluations travel in the carry, newest first.

    Of order 4 it starts with three steps of `rk4`, and takes one wherever the step size changes,
    as at a last step that is cut: what it knows then lies elsewhere than its coefficients assume.
    With `max_order = m` it is torchdiffeq's: from the third step on it uses what evaluations there
    are, up to m − 1, as if all steps were as long as this one.
    """

    holds_slopes = True

    order = _TRUE_ORDER

    def __init__(self, name: str, max_order: int | None) -> None:
        if max_order is not None:
            check_int(name, "max_order", max_order, kind="an int or None")
            if not _RAMP_FROM < max_order <= _HIGHEST:
                raise ValueError(
                    f"{name}: `max_order` must be from {_RAMP_FROM + 1} to {_HIGHEST}, "
                    f"got {max_order}. Use rk4 for less."
                )
        self.ramps = max_order is not None
        self.top = max_order or _TRUE_ORDER  # of the corrector
        self._least = _RAMP_FROM if self.ramps else _TRUE_ORDER
        self._most = self.top - 1 if self.ramps else _TRUE_ORDER

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


class ExplicitAdams(_AbstractAdams):
    """Adams–Bashforth of order 4, one evaluation a step.

    `x' = x + tau (55 f_n − 59 f_{n−1} + 37 f_{n−2} − 9 f_{n−3}) / 24`

    Args:
        max_order: None, or 4 to 12 for torchdiffeq's method of that name, whose order climbs to
            `max_order − 1`. Higher orders are stable for shorter steps only: on diffusion with
            `alpha = 1`, up to about 0.15 at order 4 and 0.0017 at order 11.

    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """

    def __init__(self, *, max_order: int | None = None) -> None:
        super().__init__("ExplicitAdams", max_order)

    def _advance(
        self, term: AbstractTerm, t: float, x: Tensor, tau: float, history: Carry
    ) -> tuple[Tensor, Carry]:
        return _predict(x, tau, history), history


class ImplicitAdams(_AbstractAdams):
    """Adams–Moulton of order 4, solved by correcting the Adams–Bashforth step until it stands.

    `x' = x + tau (9 f(x') + 19 f_n − 5 f_{n−1} + f_{n−2}) / 24`

    Evaluates `f` once a step and once a correction. A step that `max_iters` corrections do not
    settle counts all the same: its order is no less, its stability is.

    Args:
        max_order: None, or 4 to 12 for torchdiffeq's method of that name, whose order climbs to
            `max_order`. It asks each element of the step for the tolerance, and drops its oldest
            evaluation, with a warning, where the corrections do not settle.
        max_iters: corrections at most, at least 1.
        rtol, atol: the corrections end when the largest change of an element is at most
            `atol + rtol max|x'|`.

    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """

    def __init__(
        self,
        *,
        max_order: int | None = None,
        max_iters: int = 4,
        rtol: float | Tensor = 1e-7,
        atol: float | Tensor = 1e-9,
    ) -> None:
        super().__init__("ImplicitAdams", max_order)
        check_int("ImplicitAdams", "max_iters", max_iters, low=1)
        self.max_iters, self.rtol, self.atol = max_iters, rtol, atol

    def _advance(
        self, term: AbstractTerm, t: float, x: Tensor, tau: float, history: Carry
    ) -> tuple[Tensor, Carry]:
        own, *weights = moulton(min(len(history) + 1, self.top))
        base = Combination([(1.0, _weighted(x, tau, weights, history))])
        new = _predict(x, tau, history)
        for _ in range(self.max_iters):
            old, new = new, term.axpy(t + tau, new, base, tau * own)
            if self._is_settled(x, old, new):
                return new, history
        if not self.ramps:
            return new, history
        warnings.warn(
            f"implicit_adams: {self.max_iters} corrections of a step did not meet the tolerance. "
            "Try a smaller step_size.",
            stacklevel=2,
        )
        return new, history[:-1]

    @torch.no_grad()
    def _is_settled(self, x: Tensor, old: Tensor, new: Tensor) -> bool:
        """Whether the last correction changed little; reads one value from the device."""
        if x.numel() == 0:
            return True
        change = (new - old).abs_()
        if self.ramps:
            size = torch.maximum((old - x).abs_(), (new - x).abs_())
            return bool((change < size.mul_(self.rtol).add_(self.atol)).all())
        allowed = self.atol + self.rtol * torch.linalg.vector_norm(new, ord=torch.inf)
        return bool(change.max() <= allowed)


def _predict(x: Tensor, tau: float, history: Carry) -> Tensor:
    """The explicit step of as many evaluations as there are."""
    return _weighted(x, tau, bashforth(len(history)), history)


def _weighted(x: Tensor, tau: float, weights: Sequence[float], history: Carry) -> Tensor:
    """`x + tau Σ_i weights_i history_i`, over as many as there are weights."""
    pairs = zip(weights, history[: len(weights)], strict=True)
    return combine([(1.0, x), *((tau * w, f) for w, f in pairs)])
