"""Between the ends of our steps: where an event lies, and the state at any time.

The bisection and the polynomial are torchdiffeq's own.
"""

import math
from bisect import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grand_fast.solvers import time_loop
from grand_fast.solvers.gradients.checkpoint import ADJOINTS, Differentiate, Take
from grand_fast.solvers.solver import AbstractAdaptiveSolver, Carry, Step
from grand_fast.solvers.time_loop import Result
from grand_fast.solvers.torchdiffeq import package
from grand_fast.solvers.torchdiffeq.problem import Problem, State, split
from grand_fast.solvers.torchdiffeq.solves import How, by_error, checked

# Start and length of a step, the state at its start, and what it gave
Seen = Callable[[float, float, Tensor, Step], None]


class _PassedError(Exception):
    """An event lies within the step that it holds."""


def solve_until_event(
    problem: Problem, how: How, event_fn: Callable[..., Tensor], y0: State, t: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The time at which `event_fn` is zero, like `t`, and the states at the start and there."""
    operator, x0, device = problem.operator, problem.x0, problem.x0.device
    if len(t) != 2:
        raise ValueError(f"{operator}: `t` must hold two times with `event_fn`, got {len(t)}.")
    handling = package.part("event_handling")
    combined = handling.combine_event_functions(event_fn, t[0], y0)

    def event(t: Tensor, x: Tensor) -> Tensor:
        x = x.to(problem.dtype)
        state = x if problem.shapes is None else split(x, problem.shapes)
        value: Tensor = combined(problem.sign * t, state)
        return value

    @torch.no_grad()
    def sign(t: float, x: Tensor) -> Tensor:
        return event(torch.tensor(t, dtype=torch.float64, device=device), x).sign()

    def seen(begin: float, tau: float, x: Tensor, step: Step) -> None:
        if sign(begin + tau, step.x) != at_start:
            raise _PassedError(begin, tau, x, step)

    start = float(problem.t[0])
    at_start = sign(start, x0)
    if at_start == 0:
        return t[0].clone(), [x0, x0]
    whole = by_error(problem, how, [start, math.inf])
    differentiate = ADJOINTS["direct" if how.adjoint == "direct" else "checkpoint"]
    try:
        checked(_watched(whole, differentiate, seen), problem)
    except _PassedError as passed:
        begin, tau, x, step = passed.args
    ends = torch.tensor([begin, begin + tau], dtype=torch.float64, device=device)
    atol = torch.as_tensor(_pair_of(whole).atol, dtype=torch.float64)
    resolution = max(float(atol.min()), math.ulp(float(ends.abs().max())))

    def within(t: Tensor) -> Tensor:
        return whole.solver.interpolate(x, step, tau, (float(t) - begin) / tau)

    when, state = handling.find_event(
        within, at_start, *ends, event, torch.tensor(resolution, dtype=torch.float64)
    )
    return (problem.sign * when).to(t), [x0, state]


class DenseOutput:
    """The solution as a function of time, by a quartic for each step."""

    def __init__(self, problem: Problem, how: How) -> None:
        self._problem = problem
        self._ends: list[float] = [float(problem.t[0])]
        self._pieces: list[list[Tensor]] = []
        whole = by_error(problem, how, problem.t.tolist())
        self._solver = _pair_of(whole)
        checked(_watched(whole, ADJOINTS["direct"], self._keep), problem)

    def _keep(self, begin: float, tau: float, x: Tensor, step: Step) -> None:
        middle = self._solver.interpolate(x, step, tau, 0.5)
        fit = package.part("interp")._interp_fit
        self._pieces.append(fit(x, step.x, middle, step.slopes[0], step.slopes[-1], tau))
        self._ends.append(begin + tau)

    def __call__(self, t: Tensor | float) -> Tensor:
        """The state at a time, which may be one of those that the last step passed."""
        problem, ends = self._problem, self._ends
        at = problem.sign * torch.as_tensor(t, dtype=torch.float64)
        if at.numel() != 1 or not ends[0] <= at.item() <= ends[-1]:
            first, last = problem.sign * ends[0], problem.sign * ends[-1]
            got = f"{problem.sign * at.item():g}" if at.numel() == 1 else f"{at.numel()} of them"
            raise ValueError(
                f"{problem.operator}: `t` must be one time between {first:g} and {last:g}, got "
                f"{got}."
            )
        i = min(bisect(ends, at.item()), len(ends) - 1)
        bounds = torch.tensor(ends[i - 1 : i + 1], dtype=torch.float64)
        evaluate = package.part("interp")._interp_evaluate
        x: Tensor = evaluate(self._pieces[i - 1], *bounds, at.reshape(()))
        return x.to(problem.dtype)


def _pair_of(whole: time_loop.Problem) -> AbstractAdaptiveSolver:
    assert isinstance(whole.solver, AbstractAdaptiveSolver)
    return whole.solver


def _watched(whole: time_loop.Problem, differentiate: Differentiate, seen: Seen) -> Result:
    """The solve; `seen` hears of each step that counts."""
    last: list[Step] = []
    heard = whole.callbacks.accept

    def take(step: Take, x: Tensor, carry: Carry) -> Any:
        last.clear()  # no other step is kept while the next is taken
        last.append(differentiate(step, x, carry))
        return last[0]

    def accept(t: float, x: Tensor, tau: float) -> None:
        if heard:
            heard(t, x, tau)
        seen(t, tau, x, last.pop())

    return whole.solve(take, callbacks=whole.callbacks._replace(accept=accept))
