"""`odeint` and its companions: torchdiffeq's front door to the solvers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grand_fast.ops.backends import transforms_active
from grand_fast.ops.checks import check_choice
from grand_fast.solvers.checks import check_int
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.torchdiffeq import package
from grand_fast.solvers.torchdiffeq.calls import (
    StepsAdjoint,
    check_options,
    odeint_as,
    prepared,
    shared,
    with_defaults,
)
from grand_fast.solvers.torchdiffeq.events import DenseOutput
from grand_fast.solvers.torchdiffeq.problem import State, Tolerance, pose
from grand_fast.solvers.torchdiffeq.solves import How


def odeint(
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: Tolerance | None = None,
    atol: Tolerance | None = None,
    method: str | AbstractSolver | None = None,
    options: Mapping[str, object] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint: StepsAdjoint = "direct",
    memory_limit: int | None = None,
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
            any other that torchdiffeq has, on its own. Beside those, as in `integrate`:
            `"rk4_classic"`; `"semi_implicit_euler"` and `"uniformisation"`, where `func` is a term
            with a matrix and `t` rises; or a solver object, with the tolerances it holds.
        options: as torchdiffeq's, by name; what the method does not know is named in a warning, as
            there. What our solvers do not do (`step_t`, `jump_t`, `perturb`, a narrow `dtype`)
            hands the call to torchdiffeq, as do a complex `y0` and a `t` that requires a gradient.
        event_fn: function of `(t, y)`; the solve ends where it is zero, found by bisection to
            `atol`. `t` holds its start and a later time. With fixed steps on torchdiffeq's solvers.
        adjoint: `"direct"` keeps what every stage saves, `"checkpoint"` the state of each step and
            runs the step again in backward, `"auto"` is the first while there is room, then the
            second; see `integrate`. Their gradients agree to rounding.
        memory_limit: bytes that checkpoints may take for backward at any time, as in `integrate`;
            not with `"direct"` or `event_fn`.

    Returns:
        The states at `t`, `[times, …]`, in a tuple if `y0` is one; with `event_fn`, the time of the
        event and the states at both ends.

    Raises:
        ValueError, TypeError, AssertionError: as torchdiffeq; the last where an adaptive solve
            fails, too.
        NotImplementedError: a method that torchdiffeq lacks, checkpoints or a limit with a call
            that our solvers hand to torchdiffeq.

    Differentiable by `y0` and whatever `func` holds, through every stage; not by the time of an
    event, for which see `odeint_event`.
    """
    how = How(rtol, atol, method, options, adjoint, memory_limit)
    _check_gradient(how, event_fn)
    return odeint_as("odeint", func, y0, t, how, event_fn)


def _check_gradient(how: How, event_fn: Any) -> None:
    check_choice("odeint", "adjoint", how.adjoint, known=("auto", "direct", "checkpoint"))
    limit = how.limit
    if limit is None:
        return
    check_int("odeint", "memory_limit", limit, low=1, kind="an int or None")
    if how.adjoint == "direct":
        raise ValueError(
            "odeint: `memory_limit` must come with adjoint 'auto' or 'checkpoint', got 'direct'."
        )
    if event_fn is not None or transforms_active():
        where = "with an event_fn" if event_fn is not None else "under torch.func and forward mode"
        raise NotImplementedError(f"odeint: `memory_limit` must be None {where}, got {limit}.")


def odeint_event(
    func: Callable[..., State],
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, State]:
    """Integrate from `y(t0) = y0` until `event_fn` is zero, as `torchdiffeq.odeint_event` does.

    It is torchdiffeq's own function, which must be installed, over the solves of
    `odeint_interface`. With e for `event_fn` and T for the time of the event, the implicit function
    theorem gives `dT = −(∂e/∂y · dy) / (∂e/∂t + ∂e/∂y · f)`.

    Args:
        func, y0: as for `odeint`.
        t0: scalar tensor, the start.
        event_fn: function of `(t, y)` that returns a tensor; the first of its elements to change
            its sign ends the solve.
        reverse_time: integrate back in time.
        odeint_interface: `gf.odeint`, `gf.odeint_adjoint`, or another of that signature.
        kwargs: its further options, as `method`, `rtol`, `adjoint`.

    Returns:
        The time of the event, and the states at both ends, `[2, …]`, in a tuple if `y0` is one.

    Differentiable by what `odeint_interface` is, the time of the event too.
    Reference: Chen, Amos, Nickel 2021, Learning Neural Event Functions for Ordinary Differential
    Equations.
    """
    answer: tuple[Tensor, State] = package.part("odeint").odeint_event(
        func, y0, t0, event_fn=event_fn, reverse_time=reverse_time,
        odeint_interface=odeint_interface, **kwargs,
    )  # fmt: skip
    return answer


def odeint_dense(
    func: Callable[..., Tensor],
    y0: Tensor,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: Tolerance | None = None,
    atol: Tolerance | None = None,
    method: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[[Tensor | float], Tensor]:
    """The solution between two times as a function of time, as `torchdiffeq.odeint_dense` gives.

    The steps are our solver's; between their ends torchdiffeq's quartic, which must be installed.

    Args:
        func, y0, rtol, atol, options: as for `odeint`; one tensor for `y0`.
        t0, t1: start and end.
        method: `"dopri5"` (None), `"bosh3"` or `"adaptive_heun"`.

    Returns:
        A function of a time between `t0` and `t1`, float or scalar tensor, that gives the state
        there, like `y0`. It keeps five states for each step.

    Raises:
        ValueError: another method; the function, for a time outside.
        TypeError, AssertionError: as `odeint`.

    Differentiable by `y0` and whatever `func` holds, and by that time. Times that fall are as the
    caller gave them; in torchdiffeq's function they must be negated.
    """
    operator = "odeint_dense"
    check_options(operator, options=options)
    if method not in (None, *package.BY_ERROR):
        known = ", ".join(package.BY_ERROR)
        raise ValueError(f"{operator}: `method` must be one of {known}, got {method!r}.")
    if not isinstance(y0, Tensor):
        got = type(y0).__name__
        raise TypeError(f"{operator}: `y0` must be a Tensor, got {got}. Join them with torch.cat.")
    dtype = t0.dtype if isinstance(t0, Tensor) else torch.float64
    t = torch.tensor([float(t0), float(t1)], dtype=dtype)
    how = with_defaults(How(rtol, atol, method, options), y0)
    if package.reason_for_theirs(y0, t, method, options) is not None:
        theirs = package.part("odeint").odeint_dense
        solution: Callable[..., Tensor] = theirs(func, y0, t[0], t[1], **shared(how))
        sign = -1 if t[0] > t[1] else 1
        return lambda t: solution(sign * torch.as_tensor(t))
    how, problem = prepared(how, pose(func, y0, t, operator))
    return DenseOutput(problem, how)
