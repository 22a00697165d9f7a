"""One step of a method over `[t, t + tau]`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Self

from torch import Tensor

from grand_fast.solvers.combination import Combination
from grand_fast.solvers.term import AbstractTerm

Carry = tuple[Tensor, ...]


class Step(NamedTuple):
    """What one step gives.

    x:      the state at `t + tau`.
    carry:  what the next step needs beside it: slopes that would else be computed again.
    slopes: `f` at the stages, from which the state between `t` and `t + tau` follows.
    ratio:  the local error over the tolerance, a scalar on the state's device; None without an
            estimate. It carries no gradient.
    """

    x: Tensor
    carry: Carry = ()
    slopes: tuple[Tensor, ...] = ()
    ratio: Tensor | None = None


class AbstractSolver(ABC):
    """A method; it knows neither the grid nor how the solve is differentiated.

    order:        of the global error.
    is_adaptive:  whether its steps estimate their error.
    is_exact:     whether the state after a step of any length is; the order then means nothing,
                  and steps end at every output time.
    wants_matrix: whether it takes a term that is linear or can be frozen, and no other.
    holds_slopes: whether it holds `f` from step to step, or for an estimate of its error.
    """

    order: int
    is_adaptive: bool = False
    is_exact: bool = False
    wants_matrix: bool = False
    holds_slopes: bool = False

    def of(self, term: AbstractTerm) -> Self:
        """The method for one solve of `term`, with what it makes of that once."""
        return self

    def start(self, term: AbstractTerm, t: float, x: Tensor) -> Carry:
        """What the first step needs beside the state."""
        return ()

    def longest_step(self, term: AbstractTerm) -> float:
        """What a step of a grid is cut to."""
        return math.inf

    @abstractmethod
    def step(self, term: AbstractTerm, t: float, x: Tensor, tau: float, carry: Carry) -> Step:
        """One step from the state `x` at `t`."""

    def interpolate(self, x: Tensor, step: Step, tau: float, theta: float) -> Tensor:
        """The state at `t + theta · tau`, `0 ≤ theta ≤ 1`, on a straight line by default."""
        if theta == 1.0:
            return step.x
        if theta == 0.0:
            return x
        return combine([(1.0 - theta, x), (theta, step.x)])


class AbstractAdaptiveSolver(AbstractSolver):
    """A method whose steps estimate their error, and whose lengths follow from it.

    rtol, atol: tolerances of the error: floats, or tensors like the state.
    norm:       of the error over its tolerance; None: the root mean square.
    """

    is_adaptive = True
    holds_slopes = True
    rtol: float | Tensor
    atol: float | Tensor
    norm: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def slope(self, carry: Carry) -> Tensor:
        """`f` at the start of a step, without a graph, of what `start` or a step carries."""


def combine(terms: list[tuple[float, Tensor]]) -> Tensor:
    """`Σ c y` over the terms whose coefficient is not 0."""
    return Combination([(c, y) for c, y in terms if c != 0.0]).evaluate()
