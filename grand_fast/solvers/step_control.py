"""Where the steps of a solve lie: on a grid, or as a tolerance asks; and the first of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from grand_fast.ops import error_ratio
from grand_fast.solvers.solution import Status
from grand_fast.solvers.solver import combine
from grand_fast.solvers.term import AbstractTerm

Norm = Callable[[Tensor], Tensor]

# A last step shorter than this share of the step size is rounding of T / step_size, not a step.
_ROUNDING = 1e-9
# Shorter steps, possible at t = 0 alone, times the coefficients of a method underflow to nothing.
_LEAST_STEP = 1e-290
# A state or slope that is not finite does not become so by steps this much shorter.
_HOPELESS = 1e-12


class Grid(Protocol):
    """The ends of the steps, the start first; not less than the last wanted time in the end."""

    def __getitem__(self, i: int, /) -> float:
        """End number `i` of the steps, the start being number 0."""


class EvenGrid:
    """Steps of one length from `start` to exactly `end`; the last may be shorter.

    `step_size=None` means one step over the whole interval, as in torchdiffeq. The ends are
    computed when they are asked for: there may be more than there is memory.
    """

    def __init__(self, start: float, end: float, step_size: float | None) -> None:
        self._start, self._length = start, end - start
        self._step_size = step_size or 0.0
        self._steps: float = 1
        if step_size is not None:
            self._steps = max(1, self._length / step_size - _ROUNDING)  # rounded up

    def __getitem__(self, i: int) -> float:
        return self._start + (i * self._step_size if i < self._steps else self._length)


class AbstractStepControl(ABC):
    """Proposes steps and learns how they went. `t` is where the solve stands."""

    t: float
    accepted: int = 0
    rejected: int = 0
    status: Status = Status.SUCCESS
    max_steps: int | None

    @abstractmethod
    def propose(self, stop: float) -> float | None:
        """Length of the next step, not necessarily ending before `stop`; None: no step can be."""

    @abstractmethod
    def judge(self, tau: float, ratio: float) -> bool:
        """Whether the step of length `tau` counts; `ratio` is its error over the tolerance."""

    def _is_spent(self) -> bool:
        if self.max_steps is not None and self.accepted + self.rejected >= self.max_steps:
            self.status = Status.MAX_STEPS
        return self.status is Status.MAX_STEPS


class FixedSteps(AbstractStepControl):
    """Steps between the points of a grid.

    Args:
        ends: a step ends at each output time as well.
        longest: no step is longer.
        max_steps: steps before `MAX_STEPS`.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        ends: bool = False,
        longest: float = math.inf,
        max_steps: int | None = None,
    ) -> None:
        self.t, self._grid, self.max_steps = grid[0], grid, max_steps
        self._ends, self._longest = ends, longest
        self._point, self._next = 0, self.t

    def propose(self, stop: float) -> float | None:
        """To the next point of the grid, cut to `stop` and to the longest step where asked."""
        if self._is_spent():
            return None
        self._next = self._grid[self._point + 1]
        if self._ends:
            self._next = min(self._next, stop)
        if self._next - self.t > self._longest:
            self._next = self.t + self._longest
            if not self._next > self.t:
                self.status = Status.STEP_TOO_SMALL
                return None
        return self._next - self.t

    def judge(self, tau: float, ratio: float) -> bool:
        """Every step counts: there is no error to judge by."""
        self.accepted += 1
        self.t = self._next
        self._point += self.t == self._grid[self._point + 1]
        return True


class AdaptiveSteps(AbstractStepControl):
    """The elementary controller: `tau ← tau · clamp(safety · ratio^(−1/order), shrink, grow)`.

    Names, defaults and rules are torchdiffeq's.

    Args:
        t, first_step: where the solve starts, and its first step.
        order: of the method.
        ends: shorten a step so that it ends at the next output time; else it may pass it.
        min_step: steps as short as this count whatever their error; max_step: none is longer.
        safety, grow, shrink: of the controller.
        max_steps: attempts before `MAX_STEPS`.
    """

    def __init__(
        self,
        t: float,
        first_step: float,
        *,
        order: int,
        ends: bool,
        min_step: float = 0.0,
        max_step: float = math.inf,
        safety: float = 0.9,
        grow: float = 10.0,
        shrink: float = 0.2,
        max_steps: int | None = None,
    ) -> None:
        self.t, self._tau, self._order, self._ends = t, first_step, order, ends
        self._min, self._max, self.max_steps = min_step, max_step, max_steps
        self._safety, self._grow, self._shrink = safety, grow, shrink
        self._stop, self._is_cut = t, False
        self._overflowed: float | None = None  # the first of the last steps if they all did

    def propose(self, stop: float) -> float | None:
        """As long as the last error allows."""
        tau = self._tau if math.isfinite(self._tau) else self._min
        tau = min(max(tau, self._min), self._max)
        self._is_cut = self._ends and self.t + tau >= stop
        if self._is_cut:
            tau = stop - self.t
        overflowed = self._overflowed
        if overflowed is not None and tau < _HOPELESS * overflowed:
            self.status = Status.NON_FINITE
            return None
        if not self.t + tau > self.t or tau < _LEAST_STEP:
            self.status = Status.STEP_TOO_SMALL if overflowed is None else Status.NON_FINITE
            return None
        if self._is_spent():
            return None
        self._stop = stop
        return tau

    def judge(self, tau: float, ratio: float) -> bool:
        """By the error, unless the step is as short as steps may be."""
        accept = ratio <= 1 or tau <= self._min
        if math.isfinite(ratio):
            planned, self._overflowed = tau * self._factor(ratio), None
        else:  # shorter steps may stay in range, unless the shortest has left it
            planned = tau * self._shrink
            is_lost = accept and math.isnan(ratio)
            self._overflowed = math.inf if is_lost else self._overflowed or tau
        if accept and self._is_cut:  # which says nothing against a step as long as was planned
            planned = max(planned, self._tau)
        self._tau = min(max(planned, self._min), self._max)
        if accept:
            self.accepted += 1
            self.t = self._stop if self._is_cut else self.t + tau
        else:
            self.rejected += 1
        return accept

    def _factor(self, ratio: float) -> float:
        if ratio == 0:
            return self._grow
        shrink = 1.0 if ratio < 1 else self._shrink
        factor: float = self._safety * ratio ** (-1 / self._order)
        return min(self._grow, max(factor, shrink))


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
