"""`integrate`: checks, the choice of method and gradient, and the solution."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from grand_fast.ops.backends import transforms_active
from grand_fast.solvers.checks import (
    UnsupportedOptionError,
    check_choice,
    check_number,
    check_times,
)
from grand_fast.solvers.counted import CountedTerm
from grand_fast.solvers.gradients.checkpoint import ADJOINTS, checkpoint_differentiating
from grand_fast.solvers.gradients.checkpoint_adaptive import CheckpointedPair
from grand_fast.solvers.gradients.continuous import continuous
from grand_fast.solvers.gradients.memory_limit import checkpoint_within
from grand_fast.solvers.gradients.room import Room
from grand_fast.solvers.half_precision import WideTerm, is_widened
from grand_fast.solvers.methods.embedded_pairs import EmbeddedRungeKutta
from grand_fast.solvers.methods.table import METHODS, solver_of
from grand_fast.solvers.options import gathered, refuse, takes
from grand_fast.solvers.regularizers import regularized, separated
from grand_fast.solvers.solution import Solution, Status
from grand_fast.solvers.solve import Adjoint, Solve
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.term import AbstractTerm, as_term
from grand_fast.solvers.time_loop import Problem, Result

_ENDS = ("clamp", "interp")


@takes(Solve, step_size=None)
def integrate(
    term: AbstractTerm | Callable[[float, Tensor], Tensor],
    x0: Tensor,
    T: float | None = None,
    *,
    solve: Solve | None = None,
    times: Sequence[float] | None = None,
    end: Literal["clamp", "interp"] = "clamp",
    generator: torch.Generator | None = None,
    observe: Callable[[float, Tensor], None] | None = None,
    **options: Any,
) -> Solution:
    """Integrate `dx/dt = f(t, x)` from `x(0) = x0` to time `T`.

    Args:
        term: a term, or a function `f(t, x)` with `t` a Python float.
        x0: initial state, any shape.
        solve: how, as one `Solve`; else, or in place of its own, by keyword:
        {Solve.Args}
        times: rising, within `[0, T]`: the states there are `.xs`. Between the ends of steps they
            are interpolated, by a quartic with adaptive methods and linearly with others.
        end: an adaptive step may end exactly at each output time (`"clamp"`), or pass it, the state
            there being interpolated (`"interp"`, as torchdiffeq).
        generator: of ε, random signs that are drawn once a solve; None: torch's default.
        observe: called with `t` and the state at 0 and after each step that counts. Under
            `torch.no_grad()`, without regularizers.

    Returns:
        `Solution` with `.x` (like `x0`), `.t`, `.stats`, `.status`, `.xs` and `.penalties`.
        Numerical failure is a status, not an error.

    `torch.compile` and `torch.export` make one program of a solve by the explicit methods with
    fixed steps, with `"direct"` or checkpoints; others choose what to do by values they read.
    `torch.func` and forward mode take methods for any f, `vmap` those with fixed steps; a solve
    within a transform keeps what every stage saves, as `"direct"` does.
    Differentiable by `x0` and by whatever the term holds.
    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """
    if T is None and solve is None:
        raise TypeError("integrate: `T` must be given, by itself or in `solve`.")
    solve = gathered("integrate", Solve, solve, options, step_size=None)
    refuse("integrate", options, integrate)
    T = solve.T if T is None else T
    solve.check()
    check_number("T", T, positive=False)
    check_choice("end", end, _ENDS)
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        got = str(x0.dtype) if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"integrate: `x0` must be a floating tensor, got {got}.")
    if x0.layout is not torch.strided:
        raise TypeError(f"integrate: `x0` must be dense, got {x0.layout}. Try .to_dense().")
    if x0.is_meta:
        raise ValueError("integrate: `x0` must hold values, got a tensor on meta.")
    T, method, adjoint, regularizers = float(T), solve.method, solve.adjoint, solve.regularizers
    wanted = check_times(times, T)
    rtol, atol = solve.tolerances(x0.dtype)
    if observe is not None and (torch.is_grad_enabled() or regularizers):
        raise NotImplementedError(
            "integrate: `observe` must come under torch.no_grad() and with no regularizers. Ask "
            "for states with `times`, which are differentiable."
        )
    if torch.compiler.is_compiling():
        solve.check_traceable()
    term = as_term(term)
    if transforms_active():
        solver = method if isinstance(method, AbstractSolver) else METHODS[method](rtol, atol)
        solve.check_transformable(term, x0, solver)
        adjoint = "direct"
    solver = solver_of(method, rtol, atol, x0)
    if _is_planned(x0, solver, adjoint):
        term = term.planned(x0)

    beside = regularized(term, x0, solver, regularizers, generator) if regularizers else None
    if beside is not None and beside.needs_derivatives and solve.memory_limit is not None:
        raise UnsupportedOptionError(
            "integrate: `memory_limit` must come with no regularizers but kinetic, got more. "
            "Leave it out: one state a step is kept."
        )
    whole, state = beside or term, x0 if beside is None else beside.join(x0)
    if is_widened(solver, x0.dtype, abs(T) / solve.step_size if solve.step_size else 1.0):
        whole, state = WideTerm.of(whole, state)
    counted = CountedTerm(whole, solve.max_nfe)
    if adjoint != "continuous":
        solver = solver.of(counted)
    problem = Problem(
        counted, state, sorted({0.0, T, *wanted}), solver=solver, ends=end == "clamp",
        step_size=solve.step_size, first_step=solve.first_step, max_steps=solve.max_steps,
    )  # fmt: skip
    needs_derivatives = beside is not None and beside.needs_derivatives
    if observe is not None:
        call = observe
        result = problem.observed(lambda t, x: call(t, x.to(x0.dtype)))
    elif adjoint == "continuous" and torch.is_grad_enabled():
        result = continuous(problem, solve.continuous(), x0.dtype).differentiated(adjoint)
    elif adjoint != "direct" and needs_derivatives and torch.is_grad_enabled():
        result = problem.solve(checkpoint_differentiating).differentiated("checkpoint")
    else:
        result = solve_by_steps(problem, adjoint, solve.memory_limit)
    result = result.to(x0.dtype)
    penalties: dict[str, Tensor] = {}
    if beside is not None:
        result, penalties = separated(result, beside)
    failed = result.status is not Status.SUCCESS
    at = dict(zip(problem.stops, result.found, strict=False))
    xs = torch.stack([at.get(t, torch.full_like(x0, math.nan)) for t in wanted]) if wanted else None
    x, t = (result.x, result.t) if failed else (at[T], T)
    if x is x0:  # where no step counts, or one that changes nothing: the caller's own stays theirs
        x = x.clone()
    return Solution(x, result.stats, t, xs, penalties, result.status, counted.counter, counted.nfe)


def solve_by_steps(problem: Problem, adjoint: Adjoint, memory_limit: int | None) -> Result:
    """The solve, with the gradient of its steps as `adjoint` says, but for `"continuous"`."""
    if not torch.is_grad_enabled():
        return problem.solve(ADJOINTS["direct"])
    if memory_limit is not None:
        return checkpoint_within(problem, memory_limit).differentiated("checkpoint")
    if adjoint == "direct":
        return problem.solve(ADJOINTS["direct"]).differentiated("direct")
    solver, room = problem.solver, Room.of(problem.x0) if adjoint == "auto" else None
    if type(solver) is EmbeddedRungeKutta and solver.pair.is_fsal:
        result = replace(problem, solver=CheckpointedPair(solver, room)).solve(
            lambda step, x, carry: step(x, carry)
        )
    else:
        result = problem.solve(room.differentiate if room else ADJOINTS["checkpoint"])
    return result.differentiated("direct" if room and room.lasts else "checkpoint")


def _is_planned(x0: Tensor, solver: AbstractSolver, adjoint: Adjoint) -> bool:
    """Whether all evaluations of the solve are alike, so that they can be prepared at once.

    In a region of autocast, in a program that is compiled and under torch.func the operators have
    more to do; the continuous adjoint and methods that want a matrix ask for the term's own
    tensors.
    """
    if torch.compiler.is_compiling() or transforms_active() or solver.wants_matrix:
        return False
    if adjoint == "continuous" and torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled(x0.device.type)
