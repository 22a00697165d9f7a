"""`odeint`: torchdiffeq's front door to the solvers."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from grand_fast.solvers.half_precision import are_too_many
from grand_fast.solvers.tolerances import attainable_by_slopes, default_tolerances, is_narrow
from grand_fast.solvers.torchdiffeq import package
from grand_fast.solvers.torchdiffeq.problem import State, Tolerance, pose, split
from grand_fast.solvers.torchdiffeq.solves import (
    IMPLICIT,
    PAIRS,
    RUNGE_KUTTA,
    solve_by_error,
    solve_on_a_grid,
)


def odeint(
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: Tolerance | None = None,
    atol: Tolerance | None = None,
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
    rtol: Tolerance | None,
    atol: Tolerance | None,
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
    if chosen not in RUNGE_KUTTA or are_too_many(_steps(t, given), dtype):
        problem = problem.widened()
    tolerances = problem.tolerance("rtol", rtol), problem.tolerance("atol", atol)
    if is_narrow(dtype) and (chosen in PAIRS or chosen in IMPLICIT):
        tolerances = attainable_by_slopes(operator, *tolerances, problem.x0, dtype, warns=warns)
    solve = solve_by_error if chosen in PAIRS else solve_on_a_grid
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
    rtol: Tolerance | None, atol: Tolerance | None, y0: State
) -> tuple[Tolerance, Tolerance]:
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
        and (method not in PAIRS or _is_plain_control(options))
        and (method in PAIRS or not options.get("perturb", False))
        and ("adams" not in method or 4 <= options.get("max_order", 12) <= 12)
        and not any(isinstance(v, Tensor) and v.requires_grad for v in options.values())
    )


def _is_plain_control(options: dict[str, Any]) -> bool:
    has_times = any(options.get(name) is not None for name in ("step_t", "jump_t"))
    return not has_times and options.get("dtype", torch.float64) == torch.float64
