"""`odeint`: torchdiffeq's front door to the solvers."""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from grand_fast.solvers.first_step import first_step as choose_first_step
from grand_fast.solvers.first_step import rms_norm
from grand_fast.solvers.gradients.checkpoint import ADJOINTS
from grand_fast.solvers.half_precision import are_too_many
from grand_fast.solvers.methods.adams import ExplicitAdams, ImplicitAdams
from grand_fast.solvers.methods.embedded_pairs import EmbeddedRungeKutta
from grand_fast.solvers.methods.table import METHODS
from grand_fast.solvers.methods.tableaux import (
    BOGACKI_SHAMPINE_OF_TORCHDIFFEQ,
    DORMAND_PRINCE,
    HEUN,
)
from grand_fast.solvers.solution import Status
from grand_fast.solvers.solver import AbstractSolver, combine
from grand_fast.solvers.step_control import AbstractStepControl, AdaptiveSteps, FixedSteps
from grand_fast.solvers.term import CountedTerm
from grand_fast.solvers.time_loop import run_steps
from grand_fast.solvers.tolerances import attainable_by_slopes, default_tolerances, is_narrow
from grand_fast.solvers.torchdiffeq import package
from grand_fast.solvers.torchdiffeq.grid import grid_of
from grand_fast.solvers.torchdiffeq.problem import CALLBACKS, Problem, State, pose, split

_PAIRS = {
    "dopri5": DORMAND_PRINCE,
    "bosh3": BOGACKI_SHAMPINE_OF_TORCHDIFFEQ,
    "adaptive_heun": HEUN,
}
_RUNGE_KUTTA = ("euler", "midpoint", "rk4")
_IMPLICIT = ("implicit_adams", "fixed_adams")
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


def odeint(
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor | tuple[float, ...] | None = None,
    atol: float | Tensor | tuple[float, ...] | None = None,
    method: str | None = None,
    options: Mapping[str, object] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
) -> State | tuple[Tensor, State]:
    """Integrate `dy/dt = func(t, y)` from `y(t[0]) = y0`, as `torchdiffeq.odeint` does.

    Args:
        func: function of a scalar tensor `t` and a state, or a term, whose fused step is then used.
            Its attributes `callback_step`, `callback_accept_step` and `callback_reject_step`, if
            any, are called with `(t, y, dt)`.
        y0: a tensor of any shape, or a tuple of them.
        t: `[times]`, strictly increasing or decreasing.
        rtol, atol: of the adaptive methods and of the corrections of `implicit_adams`: floats, or
            one per tensor of a tuple, or tensors like the state. By default torchdiffeq's 1e-7 and
            1e-9; for a state of half precision 1e-4 both (float16) or 1e-3 both (bfloat16),
            and what such a type cannot attain is raised, with a warning.
        method: `"dopri5"` (None), `"bosh3"`, `"adaptive_heun"`, `"euler"`, `"midpoint"`, `"rk4"`,
            `"explicit_adams"` or `"implicit_adams"` (also `"fixed_adams"`) run on our solvers;
            any other that torchdiffeq has, on its own.
        options: as torchdiffeq's, by name; what the method does not know is named in a warning, as
            there. What our solvers do not do (`step_t`, `jump_t`, `perturb`, a narrow `dtype`)
            hands the call to torchdiffeq, as do `event_fn`, a complex `y0` and a `t` that requires
            a gradient.
        event_fn: the solve ends where it is zero; `t` holds its start and a later time.

    Returns:
        The states at `t`, `[times, …]`, in a tuple if `y0` is one; with `event_fn`, the time of the
        event and the states at both ends.

    Raises:
        ValueError, TypeError, AssertionError: as torchdiffeq; the last where an adaptive solve
            fails, too.

    Differentiable by `y0` and whatever `func` holds, through every stage.
    """
    return odeint_as(
        "odeint", func, y0, t, rtol=rtol, atol=atol, method=method, options=options,
        event_fn=event_fn,
    )  # fmt: skip


def odeint_as(
    operator: str,
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor | tuple[float, ...] | None,
    atol: float | Tensor | tuple[float, ...] | None,
    method: str | None,
    options: Mapping[str, object] | None,
    event_fn: Callable[..., Tensor] | None = None,
    warns: bool = True,
) -> State | tuple[Tensor, State]:
    """`odeint`, under the name of the operator that the caller called.

    warns: of tolerances that are raised.
    """
    check_options(operator, options=options)
    rtol, atol = with_defaults(rtol, atol, y0)
    chosen = "dopri5" if method is None else method
    given: dict[str, Any] = dict(options or {})
    if event_fn is not None or not _is_ours(y0, t, chosen, given):
        theirs = package.solvers()[0]
        answer: State | tuple[Tensor, State] = theirs(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
        )
        return answer
    given = package.known_options(operator, chosen, given)
    if not given.pop("implicit", True):
        chosen = "explicit_adams"
    problem = pose(func, y0, t, operator)
    dtype = problem.x0.dtype
    if chosen not in _RUNGE_KUTTA or are_too_many(_steps(t, given), dtype):
        problem = problem.widened()
    tolerances = problem.tolerance("rtol", rtol), problem.tolerance("atol", atol)
    if is_narrow(dtype) and (chosen in _PAIRS or chosen in _IMPLICIT):
        tolerances = attainable_by_slopes(operator, *tolerances, problem.x0, dtype, warns=warns)
    solve = _by_error if chosen in _PAIRS else _on_a_grid
    xs = torch.stack(solve(problem, chosen, given, *tolerances)).to(dtype)
    return xs if problem.shapes is None else split(xs, problem.shapes)


def check_options(operator: str, **options: Any) -> None:
    """Each is a mapping or None."""
    for name, given in options.items():
        if given is not None and not isinstance(given, Mapping):
            got = type(given).__name__
            raise TypeError(f"{operator}: `{name}` must be a dict or None, got {got}.")


def _steps(t: Tensor, options: Mapping[str, Any]) -> float:
    """About how many a grid has; by a constructor of its own nobody knows."""
    step = options.get("step_size")
    if isinstance(step, int | float) and step > 0:
        return float(abs(t[-1] - t[0])) / step
    return len(t) - 1.0


def with_defaults(
    rtol: float | Tensor | tuple[float, ...] | None,
    atol: float | Tensor | tuple[float, ...] | None,
    y0: State,
) -> tuple[float | Tensor | tuple[float, ...], float | Tensor | tuple[float, ...]]:
    """torchdiffeq's tolerances for None, or those of half types where the state has one."""
    defaults = default_tolerances(torch.float64)
    parts = y0 if isinstance(y0, tuple) else (y0,)
    types = [part.dtype for part in parts if isinstance(part, Tensor)]
    if types and is_narrow(joint := reduce(torch.promote_types, types)):
        defaults = default_tolerances(joint)
    return defaults[0] if rtol is None else rtol, defaults[1] if atol is None else atol


def needs_torchdiffeq(y0: State, t: Tensor) -> bool:
    """Whether the kind of the state or of the times is one that our solvers do not take."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    is_complex = any(isinstance(part, Tensor) and part.is_complex() for part in parts)
    return is_complex or (isinstance(t, Tensor) and t.requires_grad)


def _is_ours(y0: State, t: Tensor, method: str, options: dict[str, Any]) -> bool:
    return (
        not needs_torchdiffeq(y0, t)
        and package.is_known(method)
        and (method not in _PAIRS or _is_plain_control(options))
        and (method in _PAIRS or not options.get("perturb", False))
        and ("adams" not in method or 4 <= options.get("max_order", 12) <= 12)
        and not any(isinstance(v, Tensor) and v.requires_grad for v in options.values())
    )


def _is_plain_control(options: dict[str, Any]) -> bool:
    has_times = any(options.get(name) is not None for name in ("step_t", "jump_t"))
    return not has_times and options.get("dtype", torch.float64) == torch.float64


def _by_error(
    problem: Problem,
    method: str,
    options: dict[str, Any],
    rtol: float | Tensor,
    atol: float | Tensor,
) -> list[Tensor]:
    norm = problem.norm(options.get("norm"))
    solver = EmbeddedRungeKutta(_PAIRS[method], rtol=rtol, atol=atol, norm=norm)
    x0, times, term = problem.x0, problem.t.tolist(), CountedTerm(problem.term)
    carry = solver.start(term, times[0], x0)
    first = options.get("first_step")
    if first is None:
        first = choose_first_step(
            term, times[0], x0, carry[0], order=solver.order, rtol=rtol, atol=atol,
            norm=norm or rms_norm,
        )  # fmt: skip
    control = _StepsPerOutput(
        times[0],
        float(first),
        order=solver.order,
        ends=False,
        min_step=float(options.get("min_step", 0.0)),
        max_step=float(options.get("max_step", math.inf)),
        safety=float(options.get("safety", 0.9)),
        grow=float(options.get("ifactor", 10.0)),
        shrink=float(options.get("dfactor", 0.2)),
    )
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


def _on_a_grid(
    problem: Problem,
    method: str,
    options: dict[str, Any],
    rtol: float | Tensor,
    atol: float | Tensor,
) -> list[Tensor]:
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
    operator: str,
    method: str,
    options: dict[str, Any],
    rtol: float | Tensor,
    atol: float | Tensor,
) -> AbstractSolver:
    if method in _RUNGE_KUTTA:
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
