"""The two ways in which `odeint` solves: by error control, and on a grid of times."""

import math
from typing import Any

import torch
from torch import Tensor

from grand_fast.solvers.counted import CountedTerm
from grand_fast.solvers.gradients.checkpoint import ADJOINTS
from grand_fast.solvers.methods import tableaux
from grand_fast.solvers.methods.adams import ExplicitAdams, ImplicitAdams
from grand_fast.solvers.methods.embedded_pairs import EmbeddedRungeKutta
from grand_fast.solvers.methods.table import METHODS
from grand_fast.solvers.solution import Status
from grand_fast.solvers.solver import AbstractSolver, combine
from grand_fast.solvers.step_control import AbstractStepControl, AdaptiveSteps, FixedSteps, rms_norm
from grand_fast.solvers.step_control import first_step as choose_first_step
from grand_fast.solvers.time_loop import run_steps
from grand_fast.solvers.tolerances import Tolerance
from grand_fast.solvers.torchdiffeq.grid import grid_of
from grand_fast.solvers.torchdiffeq.problem import CALLBACKS, Problem

PAIRS = {
    "dopri5": tableaux.DORMAND_PRINCE,
    "bosh3": tableaux.BOGACKI_SHAMPINE_OF_TORCHDIFFEQ,
    "adaptive_heun": tableaux.HEUN,
}
RUNGE_KUTTA = ("euler", "midpoint", "rk4")
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


def solve_by_error(
    problem: Problem, method: str, options: dict[str, Any], rtol: Tolerance, atol: Tolerance
) -> list[Tensor]:
    """The states at `problem.t`, by an embedded pair and steps that its error allows."""
    norm = problem.norm(options.get("norm"))
    solver = EmbeddedRungeKutta(PAIRS[method], rtol=rtol, atol=atol, norm=norm)
    x0, times, term = problem.x0, problem.t.tolist(), CountedTerm(problem.term)
    carry = solver.start(term, times[0], x0)
    first = options.get("first_step")
    if first is None:
        first = choose_first_step(
            term, times[0], x0, carry[0], order=solver.order, rtol=rtol, atol=atol,
            norm=norm or rms_norm,
        )  # fmt: skip
    control = _StepsPerOutput(
        times[0], float(first), order=solver.order, ends=False,
        min_step=float(options.get("min_step", 0.0)),
        max_step=float(options.get("max_step", math.inf)), safety=float(options.get("safety", 0.9)),
        grow=float(options.get("ifactor", 10.0)), shrink=float(options.get("dfactor", 0.2)),
    )  # fmt: skip
    control.per_output = int(options.get("max_num_steps", control.per_output))
    callbacks = problem.callbacks(method, CALLBACKS, torch.float64)
    found, _ = run_steps(
        term, x0, times, solver=solver, control=control, differentiate=ADJOINTS["direct"],
        carry=carry, callbacks=callbacks,
    )  # fmt: skip
    status = control.status
    if status is not Status.SUCCESS:
        begins, remedy = _FAILURES[status]
        at = problem.sign * control.t
        raise AssertionError(f"{begins} at t = {at:g}, in {problem.operator}: {remedy}.")
    return found


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


def solve_on_a_grid(
    problem: Problem, method: str, options: dict[str, Any], rtol: Tolerance, atol: Tolerance
) -> list[Tensor]:
    """The states at `problem.t`, by a method with fixed steps, interpolated as `options` say."""
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise ValueError(f"{problem.operator}: `interp` must be linear or cubic, got {interp!r}.")
    solver = _solver(problem.operator, method, options, rtol, atol)
    grid = grid_of(problem, options.get("step_size"), options.get("grid_constructor"))
    times, term = problem.t.tolist(), CountedTerm(problem.term)
    # The step that reaches each time
    last = [grid.reaching(t) for t in times[1:]]
    steps = [(grid[i - 1], grid[i]) for i in last]
    is_between = [interp == "cubic" and t != b for t, (_, b) in zip(times[1:], steps, strict=True)]
    pairs = list(zip(times[1:], steps, is_between, strict=True))
    stops = {times[0]}.union(*({a, b} if cubic else {t} for t, (a, b), cubic in pairs))
    control: AbstractStepControl = FixedSteps(grid)
    found, _ = run_steps(
        term, problem.x0, sorted(stops), solver=solver, control=control,
        differentiate=ADJOINTS["direct"], carry=solver.start(term, times[0], problem.x0),
        callbacks=problem.callbacks(method, CALLBACKS[:1], problem.t.dtype),
    )  # fmt: skip
    at = dict(zip(sorted(stops), found, strict=True))
    return [problem.x0] + [
        _hermite(term, t, a, at[a], b, at[b]) if cubic else at[t] for t, (a, b), cubic in pairs
    ]


def _solver(
    operator: str, method: str, options: dict[str, Any], rtol: float | Tensor, atol: float | Tensor,
) -> AbstractSolver:  # fmt: skip
    if method in RUNGE_KUTTA:
        return METHODS[method](0.0, 0.0)
    order = int(options.get("max_order", 12))
    if method == "explicit_adams":
        return ExplicitAdams(max_order=order)
    iters = int(options.get("max_iters", 4))
    if iters < 1:
        raise ValueError(f"{operator}: `max_iters` must be at least 1, got {iters}.")
    return ImplicitAdams(max_order=order, max_iters=iters, rtol=rtol, atol=atol)


def _hermite(
    term: CountedTerm, t: float, before: float, x: Tensor, after: float, y: Tensor
) -> Tensor:
    """The cubic through both ends of a step and their slopes."""
    tau = after - before
    h = (t - before) / tau
    terms = [
        ((1 + 2 * h) * (1 - h) ** 2, x),
        (h * (1 - h) ** 2 * tau, term.vf(before, x)),
        (h * h * (3 - 2 * h), y),
        (h * h * (h - 1) * tau, term.vf(after, y)),
    ]
    return combine(terms)
