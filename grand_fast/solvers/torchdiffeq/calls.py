"""A call in torchdiffeq's form: ours or its own, its options, and what it returns."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from grand_fast.ops.backends import transforms_active
from grand_fast.solvers.half_precision import is_widened
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.tolerances import attainable_by_slopes, default_tolerances, is_narrow
from grand_fast.solvers.torchdiffeq import package
from grand_fast.solvers.torchdiffeq.events import solve_until_event
from grand_fast.solvers.torchdiffeq.problem import (
    GivenTerm,
    Problem,
    State,
    pose,
    split,
)
from grand_fast.solvers.torchdiffeq.solves import (
    IMPLICIT,
    PAIRS,
    How,
    method_of,
    solve_by_error,
    solve_on_a_grid,
)

StepsAdjoint = Literal["auto", "direct", "checkpoint"]


def odeint_as(
    operator: str,
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    how: How,
    event_fn: Callable[..., Tensor] | None = None,
    *,
    warns: bool = True,
) -> State | tuple[Tensor, State]:
    """`odeint`, under the name of the operator that the caller called.

    warns: of tolerances that are raised.
    """
    check_options(operator, options=how.options)
    how = with_defaults(how, y0)
    reason = package.reason_for_theirs(y0, t, how.method, how.options, event_fn)
    if reason is not None:
        check_theirs(operator, reason, how)
        answer: State | tuple[Tensor, State] = package.solvers()[0](
            func, y0, t, **shared(how), event_fn=event_fn
        )
        return answer
    how, problem = prepared(how, pose(func, y0, t, operator), warns=warns)
    if event_fn is not None:
        when, states = solve_until_event(problem, how, event_fn, y0, t)
        return when, returned(problem, torch.stack(states))
    solve = solve_by_error if how.chooses_steps else solve_on_a_grid
    return returned(problem, torch.stack(solve(problem, how)))


def shared(how: How) -> dict[str, Any]:
    """What torchdiffeq knows of it."""
    return {name: getattr(how, name) for name in ("rtol", "atol", "method", "options")}


def prepared(how: How, problem: Problem, *, warns: bool = True) -> tuple[How, Problem]:
    """What it comes to, and the problem with a state that steps can be added up in."""
    method = "dopri5" if how.method is None else how.method
    operator, dtype = problem.operator, problem.dtype
    options = package.known_options(operator, method, how.known)
    if not options.pop("implicit", True):
        method = "explicit_adams"
    kind = method_of(method) if isinstance(method, str) else method
    if kind.wants_matrix:
        _check_matrix(problem, kind)
    if is_widened(kind, dtype, _steps(problem.t, options)):
        problem = problem.widened()
    rtol, atol = problem.tolerance("rtol", how.rtol), problem.tolerance("atol", how.atol)
    if is_narrow(dtype) and (method in PAIRS or method in IMPLICIT):
        rtol, atol = attainable_by_slopes(operator, rtol, atol, problem.x0, dtype, warns=warns)
    adjoint = "direct" if transforms_active() else how.adjoint
    return How(rtol, atol, method, options, adjoint, how.limit), problem


def returned(problem: Problem, xs: Tensor) -> State:
    """The states in the caller's type and form."""
    xs = xs.to(problem.dtype)
    return xs if problem.shapes is None else split(xs, problem.shapes)


def check_theirs(operator: str, reason: str, how: How) -> None:
    """A call that torchdiffeq is to answer is one that it can answer.

    Raises:
        NotImplementedError: the method is ours, or less memory is asked for.
    """
    if how.method is not None and package.is_ours_alone(how.method):
        raise NotImplementedError(
            f"{operator}: `method` must be one of torchdiffeq's where {reason}, got {how.name!r}."
        )
    if how.adjoint == "checkpoint" or how.limit is not None:
        got = "'checkpoint'" if how.limit is None else f"a limit of {how.limit} bytes"
        raise NotImplementedError(
            f"{operator}: `adjoint` must be 'direct' or 'auto', without a limit, where {reason}, "
            f"which torchdiffeq answers, got {got}."
        )


def _check_matrix(problem: Problem, kind: AbstractSolver) -> None:
    name, operator = type(kind).__name__, problem.operator
    if problem.sign < 0:
        raise ValueError(
            f"{operator}: `t` must rise for {name}, got times that fall: it is diffusion that it "
            "solves. Use dopri5."
        )
    if not isinstance(problem.term, GivenTerm):
        got = "a tuple for `y0`" if problem.shapes else type(problem.func).__name__
        raise TypeError(
            f"{operator}: `func` must be a term with a matrix for {name}, as "
            f"gf.terms.linear makes, got {got}. Use an explicit method such as rk4."
        )


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


def with_defaults(how: How, y0: State) -> How:
    """torchdiffeq's tolerances for None, or those of half types where the state has one."""
    defaults = default_tolerances(torch.float64)
    parts = y0 if isinstance(y0, tuple) else (y0,)
    types = [part.dtype for part in parts if isinstance(part, Tensor)]
    if types and is_narrow(joint := reduce(torch.promote_types, types)):
        defaults = default_tolerances(joint)
    rtol, atol = (
        d if given is None else given
        for given, d in zip((how.rtol, how.atol), defaults, strict=True)
    )
    return replace(how, rtol=rtol, atol=atol)
