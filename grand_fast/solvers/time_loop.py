"""The only time loop of the package, and the solve that it runs: what, by which method, up to when.

Steps, their acceptance, and the states that are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grand_fast.solvers.counted import CountedTerm
from grand_fast.solvers.gradients.checkpoint import Differentiate
from grand_fast.solvers.solution import Stats, Status
from grand_fast.solvers.solver import AbstractAdaptiveSolver, AbstractSolver, Carry, Step
from grand_fast.solvers.step_control import (
    AbstractStepControl,
    AdaptiveSteps,
    EvenGrid,
    FixedSteps,
    first_step,
)
from grand_fast.solvers.term import AbstractTerm

# Called with (t, x, tau) before a step, and after one that counts, or does not.
Callback = Callable[[float, Tensor, float], None]


class Callbacks(NamedTuple):
    """What a caller wants to hear of, as torchdiffeq names them."""

    step: Callback | None = None
    accept: Callback | None = None
    reject: Callback | None = None


def run_steps(
    term: CountedTerm,
    x: Tensor,
    times: Sequence[float],
    *,
    solver: AbstractSolver,
    control: AbstractStepControl,
    differentiate: Differentiate,
    carry: Carry,
    callbacks: Callbacks | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The states at `times`, which rise from the start, and the last state that counts.

    After a failure there are fewer, and `control` says why, and where. `carry` is what
    `solver.start` gave.
    """
    found = [x]
    # The state within a step that passed an output time. No other step is kept while the next is
    # taken: its slopes are as many states as it has stages.
    within: Callable[[float], Tensor] | None = None
    on_step, on_accept, on_reject = callbacks or Callbacks()
    for stop in times[1:]:
        while control.t < stop:
            if term.is_spent:
                control.status = Status.MAX_STEPS
                return found, x
            within = None
            t, tau = control.t, control.propose(stop)
            if tau is None:
                return found, x
            if on_step:
                on_step(t, x, tau)
            step: Step
            if torch.compiler.is_compiling():
                take = partial(_step_counted_apart, solver, term.term, t, tau)
                step, nfe = differentiate(take, x, carry)
                term.counter.nfe += nfe
            else:
                step = differentiate(partial(_step, solver, term, t, tau), x, carry)
            # The one value that is read from the device
            counts = control.judge(tau, 0.0 if step.ratio is None else float(step.ratio))
            heard = on_accept if counts else on_reject
            if heard:
                heard(t, x, tau)
            if counts:
                if control.t > stop:
                    within = partial(_at, solver, x, step, t, control.t, tau)
                x, carry = step.x, step.carry
            del step
        found.append(x if within is None or control.t == stop else within(stop))
    return found, x


def _at(
    solver: AbstractSolver, x: Tensor, step: Step, start: float, end: float, tau: float, t: float
) -> Tensor:
    """The state at the time `t` within a step."""
    return solver.interpolate(x, step, tau, (t - start) / (end - start))


def _step(
    solver: AbstractSolver, term: CountedTerm, t: float, tau: float, x: Tensor, carry: Carry
) -> Step:
    return solver.step(term, t, x, tau, carry)


def _step_counted_apart(
    solver: AbstractSolver, term: AbstractTerm, t: float, tau: float, x: Tensor, carry: Carry
) -> tuple[Step, int]:
    """A checkpointed part of a compiled program may change nothing that lies outside of it."""
    counted = CountedTerm(term)
    return solver.step(counted, t, x, tau, carry), counted.nfe


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

    def differentiated(self, adjoint: str) -> "Result":
        """Its stats say how it will be differentiated."""
        return self._replace(stats=replace(self.stats, adjoint=adjoint))


@dataclass(frozen=True)
class Problem:
    """From `x0` at `stops[0]` through the rising output times `stops`.

    Options as in `integrate`. `ends`: an adaptive step ends at each output time. `steps`: what
    proposes the steps, by what the method's `start` gave, in place of those options.
    """

    term: CountedTerm
    x0: Tensor
    stops: list[float]
    solver: AbstractSolver = field(kw_only=True)
    step_size: float | None = field(default=None, kw_only=True)
    ends: bool = field(default=True, kw_only=True)
    first_step: float | None = field(default=None, kw_only=True)
    max_steps: int | None = field(default=None, kw_only=True)
    steps: Callable[[Carry], AbstractStepControl] | None = field(default=None, kw_only=True)
    callbacks: Callbacks = field(default=Callbacks(), kw_only=True)

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
            differentiate=differentiate, callbacks=callbacks or self.callbacks,
        )  # fmt: skip
        stats = Stats(self.term.nfe - before, control.accepted, control.rejected)
        return Result(found, x, control.t, stats, control.status)

    def control(self, x0: Tensor, carry: Carry) -> AbstractStepControl:
        """What proposes the steps; of adaptive ones it chooses the first, by an evaluation of f."""
        if self.steps is not None:
            return self.steps(carry)
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
