"""The only time loop of the package: steps, their acceptance, and the states that are asked for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from grand_fast.solvers.gradients.checkpoint import Differentiate
from grand_fast.solvers.solution import Status
from grand_fast.solvers.solver import AbstractSolver, Carry, Step
from grand_fast.solvers.step_control import AbstractStepControl
from grand_fast.solvers.term import AbstractTerm, CountedTerm

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
    max_nfe: int | None = None,
    callbacks: Callbacks | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The states at `times`, which rise from the start, and the last state that counts.

    After a failure there are fewer, and `control` says why, and where. `carry` is what
    `solver.start` gave.
    """
    found = [x]
    # Of a step that passed an output time: x, it, its ends, tau. No other is kept while the next is
    # taken: its slopes are as many states as it has stages.
    before: tuple[Tensor, Step, float, float, float] | None = None
    on_step, on_accept, on_reject = callbacks or Callbacks()
    for stop in times[1:]:
        while control.t < stop:
            if max_nfe is not None and term.nfe >= max_nfe:
                control.status = Status.MAX_STEPS
                return found, x
            before = None
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
                before = (x, step, t, control.t, tau) if control.t > stop else None
                x, carry = step.x, step.carry
            del step
        if before is None or control.t == stop:
            found.append(x)
        else:
            from_x, passed, start, end, tau = before
            theta = (stop - start) / (end - start)
            found.append(solver.interpolate(from_x, passed, tau, theta))
    return found, x


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
