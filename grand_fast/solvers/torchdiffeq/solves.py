"""The two ways in which `odeint` solves: by error control, and on a grid of times."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grand_fast.solvers import time_loop
from grand_fast.solvers.counted import CountedTerm
from grand_fast.solvers.gradients.checkpoint import ADJOINTS
from grand_fast.solvers.integrate import solve_by_steps
from grand_fast.solvers.methods import tableaux
from grand_fast.solvers.methods.adams import ExplicitAdams, ImplicitAdams
from grand_fast.solvers.methods.embedded_pairs import EmbeddedRungeKutta
from grand_fast.solvers.methods.table import METHODS
from grand_fast.solvers.solution import Status
from grand_fast.solvers.solve import Adjoint
from grand_fast.solvers.solver import AbstractAdaptiveSolver, AbstractSolver, Carry, combine
from grand_fast.solvers.step_control import AdaptiveSteps, FixedSteps, rms_norm
from grand_fast.solvers.step_control import first_step as choose_first_step
from grand_fast.solvers.time_loop import Result
from grand_fast.solvers.torchdiffeq.grid import grid_of
from grand_fast.solvers.torchdiffeq.problem import CALLBACKS, Problem

PAIRS = {
    "dopri5": tableaux.DORMAND_PRINCE,
    "bosh3": tableaux.BOGACKI_SHAMPINE_OF_TORCHDIFFEQ,
    "adaptive_heun": tableaux.HEUN,
}
IMPLICIT = ("implicit_adams", "fixed_adams")
# How torchdiffeq's messages begin, by which its users tell failures apart; what it was and to try
_FAILURES = {
    Status.STEP_TOO_SMALL: (
        "underflow in dt",
        "the step fell below the resolution of t: try larger rtol and atol, float64, or a smaller "
        "learning rate; func may have a discontinuity there",
    ),
    Status.NON_FINITE: (
        "non-finite values in state `y`",
        "the state is not finite: try a smaller learning rate, and inputs without NaN",
    ),
    Status.MAX_STEPS: (
        "max_num_steps exceeded",
        "try a larger max_num_steps in options, or larger rtol and atol",
    ),
}


@dataclass(frozen=True, eq=False)
class How:
    """How a problem is solved: what `odeint` was given beside it, or what that comes to."""

    rtol: Any = None
    atol: Any = None
    method: Any = None
    options: Mapping[str, Any] | None = None
    adjoint: Adjoint = "direct"
    limit: int | None = None  # of the bytes of checkpoints

    @property
    def known(self) -> Mapping[str, Any]:
        """The options."""
        return self.options or {}

    @property
    def name(self) -> str:
        """Of the method, for warnings."""
        return str(self.method) if isinstance(self.method, str) else type(self.method).__name__

    @property
    def chooses_steps(self) -> bool:
        """Whether the steps are as long as their error allows."""
        return self.name in PAIRS or isinstance(self.method, AbstractAdaptiveSolver)

    def solved(self, whole: time_loop.Problem, problem: Problem) -> Result:
        """The solve, differentiable by its steps."""
        return checked(solve_by_steps(whole, self.adjoint, self.limit), problem)


def checked(result: Result, problem: Problem) -> Result:
    """Itself if the solve succeeded.

    Raises:
        AssertionError: as torchdiffeq's solvers raise it.
    """
    if result.status is not Status.SUCCESS:
        begins, remedy = _FAILURES[result.status]
        at = problem.sign * result.t
        raise AssertionError(f"{begins} at t = {at:g}, in {problem.operator}: {remedy}.")
    return result


def by_error(problem: Problem, how: How, times: Sequence[float]) -> time_loop.Problem:
    """The solve through `times` by an embedded pair and steps that its error allows."""
    options, x0, term = how.known, problem.x0, CountedTerm(problem.term)
    solver: AbstractAdaptiveSolver
    if isinstance(how.method, AbstractAdaptiveSolver):
        solver = how.method
    else:
        norm = problem.norm(options.get("norm"))
        solver = EmbeddedRungeKutta(PAIRS[how.name], rtol=how.rtol, atol=how.atol, norm=norm)

    def steps(carry: Carry) -> AdaptiveSteps:
        first = options.get("first_step")
        if first is None:
            first = choose_first_step(
                term, times[0], x0, solver.slope(carry), order=solver.order, rtol=solver.rtol,
                atol=solver.atol, norm=solver.norm or rms_norm,
            )  # fmt: skip
        control = _StepsPerOutput(
            times[0], float(first), order=solver.order, ends=False,
            min_step=float(options.get("min_step", 0.0)),
            max_step=float(options.get("max_step", math.inf)),
            safety=float(options.get("safety", 0.9)), grow=float(options.get("ifactor", 10.0)),
            shrink=float(options.get("dfactor", 0.2)),
        )  # fmt: skip
        control.per_output = int(options.get("max_num_steps", control.per_output))
        return control

    callbacks = problem.callbacks(how.name, CALLBACKS, torch.float64)
    return time_loop.Problem(term, x0, list(times), solver=solver, steps=steps, callbacks=callbacks)


class _StepsPerOutput(AdaptiveSteps):
    """Its limit counts attempts anew from each output time on, as torchdiffeq's does."""

    per_output = 2**31 - 1
    _output: float | None = None

    def propose(self, stop: float) -> float | None:
        """As long as the last error allows."""
        if stop != self._output:
            self._output = stop
            self.max_steps = self.accepted + self.rejected + self.per_output
        return super().propose(stop)


def solve_by_error(problem: Problem, how: How) -> list[Tensor]:
    """The states at `problem.t`, by an embedded pair."""
    return how.solved(by_error(problem, how, problem.t.tolist()), problem).found


def solve_on_a_grid(problem: Problem, how: How) -> list[Tensor]:
    """The states at `problem.t`, by a method with fixed steps, interpolated as `options` say."""
    options = how.known
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise ValueError(f"{problem.operator}: `interp` must be linear or cubic, got {interp!r}.")
    solver = _solver(problem.operator, how)
    grid = grid_of(problem, options.get("step_size"), options.get("grid_constructor"))
    times, term = problem.t.tolist(), CountedTerm(problem.term)
    # The step that reaches each time
    last = [grid.reaching(t) for t in times[1:]]
    steps = [(grid[i - 1], grid[i]) for i in last]
    is_cubic = interp == "cubic" and not solver.is_exact
    is_between = [is_cubic and t != b for t, (_, b) in zip(times[1:], steps, strict=True)]
    pairs = list(zip(times[1:], steps, is_between, strict=True))
    stops = sorted({times[0]}.union(*({a, b} if cubic else {t} for t, (a, b), cubic in pairs)))

    def control(carry: Carry) -> FixedSteps:
        longest = solver.longest_step(term) if len(stops) > 1 else 0.0
        return FixedSteps(grid, ends=solver.is_exact, longest=longest)

    whole = time_loop.Problem(
        term, problem.x0, stops, solver=solver, steps=control,
        callbacks=problem.callbacks(how.name, CALLBACKS[:1], problem.t.dtype),
    )  # fmt: skip
    at = dict(zip(stops, how.solved(whole, problem).found, strict=True))
    differentiate = ADJOINTS["direct" if how.adjoint == "direct" else "checkpoint"]
    return [problem.x0] + [
        differentiate(partial(_hermite, term, t, a, b), at[a], (at[b],)) if cubic else at[t]
        for t, (a, b), cubic in pairs
    ]


def method_of(name: str) -> AbstractSolver:
    """A solver by that name, with no tolerance: what kind of method it is."""
    return METHODS["implicit_adams" if name in IMPLICIT else name](0.0, 0.0)


def _solver(operator: str, how: How) -> AbstractSolver:
    options, method = how.known, how.method
    if isinstance(method, AbstractSolver):
        return method
    if "adams" not in method:
        return method_of(method)
    order = int(options.get("max_order", 12))
    if method == "explicit_adams":
        return ExplicitAdams(max_order=order)
    iters = int(options.get("max_iters", 4))
    if iters < 1:
        raise ValueError(f"{operator}: `max_iters` must be at least 1, got {iters}.")
    return ImplicitAdams(max_order=order, max_iters=iters, rtol=how.rtol, atol=how.atol)


def _hermite(
    term: CountedTerm, t: float, before: float, after: float, x: Tensor, ends: Carry
) -> Tensor:
    """The cubic through both ends of a step and their slopes."""
    (y,) = ends
    tau = after - before
    h = (t - before) / tau
    terms = [
        ((1 + 2 * h) * (1 - h) ** 2, x),
        (h * (1 - h) ** 2 * tau, term.vf(before, x)),
        (h * h * (3 - 2 * h), y),
        (h * h * (h - 1) * tau, term.vf(after, y)),
    ]
    return combine(terms)
