"""`integrate`: checks, the choice of method and grid, and the solution."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from grand_fast.solvers._adjoint import ADJOINTS, Adjoint
from grand_fast.solvers._embedded import EmbeddedRungeKutta
from grand_fast.solvers._first_step import first_step as choose_first_step
from grand_fast.solvers._loop import march
from grand_fast.solvers._methods import ADAPTIVE, METHODS, Method
from grand_fast.solvers._solution import Solution, Stats, Status
from grand_fast.solvers._solver import AbstractSolver
from grand_fast.solvers._step_control import (
    AbstractStepControl,
    AdaptiveSteps,
    FixedSteps,
    fixed_grid,
)
from grand_fast.solvers._term import AbstractTerm, CountedTerm, FunctionTerm
from grand_fast.solvers._tolerances import Convention, attainable, tolerances

_ENDS = ("clamp", "interp")


def integrate(
    term: AbstractTerm | Callable[[float, Tensor], Tensor],
    x0: Tensor,
    T: float,
    *,
    method: Method | AbstractSolver = "rk4",
    step_size: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    tol_scale: float | None = None,
    tol_convention: Convention = "released",
    adjoint: Adjoint = "checkpoint",
    times: Sequence[float] | None = None,
    end: Literal["clamp", "interp"] = "clamp",
    first_step: float | None = None,
    max_steps: int | None = None,
    max_nfe: int | None = None,
) -> Solution:
    """Integrate `dx/dt = f(t, x)` from `x(0) = x0` to time `T`.

    Args:
        term: a term, or a function `f(t, x)` with `t` a Python float.
        x0: initial state, any shape.
        T: end time, at least 0; 0 returns `x0`.
        method: with fixed steps `"euler"` (equation 7), `"midpoint"`, `"rk4"` (3/8 rule, as
            torchdiffeq) or `"rk4_classic"` (equations 33 to 37); with adaptive steps `"dopri5"`
            (the paper's), `"bosh3"` or `"adaptive_heun"`; for terms with a matrix
            `"semi_implicit_euler"` (equation 8), for linear ones the exact `"uniformisation"`; or a
            solver object.
        step_size: length of a step, in units of `t`; the last step is cut to end at `T`. None: one
            step. Of methods with fixed steps.
        rtol, atol: the error of an adaptive step in the root mean square of
            `error_i / (atol + rtol |x_i|)` is at most 1. By default 1e-7 and 1e-9 in float64, 1e-5
            and 1e-6 in narrower types. What the type cannot attain is raised, with a warning.
        tol_scale, tol_convention: instead of both; `"released"`: atol = tol_scale · 1e-7, rtol =
            tol_scale · 1e-9, as GRAND's released code; `"paper"`: 1e-12 and 1e-6, as its text.
        adjoint: `"checkpoint"` keeps the state of each step and runs the step again in backward,
            `"direct"` keeps what every stage saves. Their gradients agree to rounding. Neither
            differentiates the length of a step.
        times: rising, within `[0, T]`: the states there are `.xs`. Between the ends of steps they
            are interpolated, by a quartic with adaptive methods and linearly with others.
        end: an adaptive step may end exactly at each output time (`"clamp"`), or pass it, the state
            there being interpolated (`"interp"`, as torchdiffeq).
        first_step: of an adaptive method; by default chosen from two evaluations of `f`.
        max_steps, max_nfe: attempted steps and evaluations after which the solve gives up.

    Returns:
        `Solution` with `.x` (like `x0`), `.t`, `.stats`, `.status` and `.xs`. Numerical failure is
        a status, not an error.

    Differentiable by `x0` and by whatever the term holds.
    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """
    _check_choice("adjoint", adjoint, tuple(ADJOINTS))
    _check_choice("end", end, _ENDS)
    _check_number("T", T, positive=False)
    for name, value in (("step_size", step_size), ("first_step", first_step)):
        if value is not None:
            _check_number(name, value, positive=True)
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        got = str(x0.dtype) if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"integrate: `x0` must be a floating tensor, got {got}.")
    T = float(T)
    wanted = _check_times(times, T)
    rtol, atol = tolerances(x0.dtype, rtol, atol, tol_scale, tol_convention)
    solver = method if isinstance(method, AbstractSolver) else _solver(method, rtol, atol, x0)

    counted = CountedTerm(term if isinstance(term, AbstractTerm) else FunctionTerm(term))
    carry = solver.start(counted, 0.0, x0)
    control: AbstractStepControl
    if isinstance(solver, EmbeddedRungeKutta):
        if first_step is None:
            first_step = choose_first_step(
                counted, 0.0, x0, carry[0], order=solver.order, rtol=solver.rtol, atol=solver.atol
            )
        control = AdaptiveSteps(
            0.0, first_step, order=solver.order, ends=end == "clamp", max_steps=max_steps
        )
    else:
        grid = fixed_grid(T, step_size)
        if solver.is_exact:
            grid = sorted({*grid, *wanted})
        control = FixedSteps(grid, max_steps=max_steps)
    stops = sorted({0.0, T, *wanted})
    found, x = march(
        counted,
        x0,
        stops,
        solver=solver,
        control=control,
        differentiate=ADJOINTS[adjoint],
        carry=carry,
        max_nfe=max_nfe,
    )
    failed = control.status is not Status.SUCCESS
    at = dict(zip(stops, found, strict=False))
    xs = torch.stack([at.get(t, torch.full_like(x0, math.nan)) for t in wanted]) if wanted else None
    stats = Stats(nfe=counted.nfe, accepted=control.accepted, rejected=control.rejected)
    return Solution(x if failed else at[T], stats, control.t if failed else T, xs, control.status)


def _solver(method: str, rtol: float, atol: float, x0: Tensor) -> AbstractSolver:
    _check_choice("method", method, tuple(METHODS))
    if method in ADAPTIVE:
        atol = attainable(rtol, atol, x0)
    return METHODS[method](rtol, atol)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"integrate: `{name}` must be one of {', '.join(known)}, got {value!r}.")


def _check_number(name: str, value: float, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"integrate: `{name}` must be a float, got {type(value).__name__}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        bound = "above 0" if positive else "at least 0"
        raise ValueError(f"integrate: `{name}` must be finite and {bound}, got {value}.")


def _check_times(times: Sequence[float] | None, T: float) -> list[float]:
    if times is None:
        return []
    wanted = [float(t) for t in times]
    rises = all(a < b for a, b in zip(wanted, wanted[1:], strict=False))
    if not wanted or not rises or not (wanted[0] >= 0 and wanted[-1] <= T):
        got = f"{wanted[:3]}…" if len(wanted) > 3 else f"{wanted}"
        raise ValueError(f"integrate: `times` must rise within [0, T] = [0, {T:g}], got {got}.")
    return wanted
