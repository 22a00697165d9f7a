"""A solve that is about to run: what is integrated, by what, and where its states are wanted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from grand_fast.solvers.gradients.checkpoint import Differentiate
from grand_fast.solvers.solution import Stats, Status
from grand_fast.solvers.solver import AbstractAdaptiveSolver, AbstractSolver, Carry
from grand_fast.solvers.step_control import (
    AbstractStepControl,
    AdaptiveSteps,
    EvenGrid,
    FixedSteps,
    first_step,
)
from grand_fast.solvers.term import CountedTerm
from grand_fast.solvers.time_loop import Callbacks, run_steps


class Result(NamedTuple):
    """What a solve came to.

    found:  the states at the output times that were reached, the first of them the initial state.
    x, t:   the last state that counts, and its time.
    """

    found: list[Tensor]
    x: Tensor
    t: float
    stats: Stats
    status: Status

    def to(self, dtype: torch.dtype) -> "Result":
        """With states of a type; as it is where they have it."""
        return self._replace(found=[x.to(dtype) for x in self.found], x=self.x.to(dtype))


@dataclass(frozen=True)
class Problem:
    """From `x0` at `stops[0]` through the rising output times `stops`.

    Options as in `integrate`. `ends`: an adaptive step ends at each output time.
    """

    term: CountedTerm
    x0: Tensor
    stops: list[float]
    solver: AbstractSolver = field(kw_only=True)
    step_size: float | None = field(default=None, kw_only=True)
    ends: bool = field(default=True, kw_only=True)
    first_step: float | None = field(default=None, kw_only=True)
    max_steps: int | None = field(default=None, kw_only=True)
    max_nfe: int | None = field(default=None, kw_only=True)

    def solve(
        self, differentiate: Differentiate, *, x0: Tensor | None = None,
        callbacks: Callbacks | None = None,
    ) -> Result:  # fmt: skip
        """Solve it, differentiably by the steps that count."""
        x0 = self.x0 if x0 is None else x0
        before = self.term.nfe
        carry = self.solver.start(self.term, self.stops[0], x0)
        control = self.control(x0, carry)
        found, x = run_steps(
            self.term, x0, self.stops, solver=self.solver, control=control, carry=carry,
            differentiate=differentiate, max_nfe=self.max_nfe, callbacks=callbacks,
        )  # fmt: skip
        stats = Stats(self.term.nfe - before, control.accepted, control.rejected)
        return Result(found, x, control.t, stats, control.status)

    def control(self, x0: Tensor, carry: Carry) -> AbstractStepControl:
        """What proposes the steps."""
        start = self.stops[0]
        if not isinstance(self.solver, AbstractAdaptiveSolver):
            takes_steps = len(self.stops) > 1
            return FixedSteps(
                EvenGrid(start, self.stops[-1], self.step_size),
                ends=self.solver.is_exact,
                longest=self.solver.longest_step(self.term) if takes_steps else 0.0,
                max_steps=self.max_steps,
            )
        tau = self.first_step
        if tau is None:
            tau = first_step(
                self.term, start, x0, self.solver.slope(carry), order=self.solver.order,
                rtol=self.solver.rtol, atol=self.solver.atol, norm=self.solver.norm,
            )  # fmt: skip
        return AdaptiveSteps(
            start, tau, order=self.solver.order, ends=self.ends, max_steps=self.max_steps
        )

    def observed(
        self, observe: Callable[[float, Tensor], None], x0: Tensor | None = None
    ) -> Result:
        """Solve it without a graph; `observe` hears of the start and the end of each step."""
        callbacks = Callbacks(accept=lambda t, x, tau: observe(t, x))
        with torch.no_grad():
            result = self.solve(lambda step, x, carry: step(x, carry), x0=x0, callbacks=callbacks)
        observe(result.t, result.x)
        return result

    def record(self, x0: Tensor) -> tuple[Result, dict[float, Tensor]]:
        """Solve it without a graph; also the states at the ends of its steps, by their times."""
        states: dict[float, Tensor] = {}
        return self.observed(states.__setitem__, x0), states
