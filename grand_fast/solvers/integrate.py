"""`integrate`: checks, the choice of method and gradient, and the solution."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from grand_fast.ops.backends import transforms_active
from grand_fast.solvers.checks import (
    check_choice,
    check_count,
    check_number,
    check_times,
    check_traceable,
)
from grand_fast.solvers.gradients.checkpoint import (
    ADJOINTS,
    Adjoint,
    check_transformable,
    checkpoint_differentiating,
)
from grand_fast.solvers.gradients.checkpoint_adaptive import CheckpointedPair
from grand_fast.solvers.gradients.continuous import ContinuousOptions, continuous
from grand_fast.solvers.gradients.memory_limit import checkpoint_within
from grand_fast.solvers.half_precision import WideTerm, is_widened
from grand_fast.solvers.methods.embedded_pairs import EmbeddedRungeKutta
from grand_fast.solvers.methods.table import METHODS, Method, solver_of
from grand_fast.solvers.problem import Problem
from grand_fast.solvers.regularizers import Regularizer, regularized, separated
from grand_fast.solvers.solution import Solution, Status
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.term import AbstractTerm, CountedTerm, FunctionTerm
from grand_fast.solvers.tolerances import Convention, tolerances

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
    adjoint_options: ContinuousOptions | None = None,
    memory_limit: int | None = None,
    times: Sequence[float] | None = None,
    end: Literal["clamp", "interp"] = "clamp",
    first_step: float | None = None,
    max_steps: int | None = None,
    max_nfe: int | None = None,
    regularizers: Sequence[Regularizer] = (),
    generator: torch.Generator | None = None,
    observe: Callable[[float, Tensor], None] | None = None,
) -> Solution:
    """Integrate `dx/dt = f(t, x)` from `x(0) = x0` to time `T`.

    Args:
        term: a term, or a function `f(t, x)` with `t` a Python float.
        x0: initial state, any shape.
        T: end time, at least 0; 0 returns a copy of `x0`.
        method: with fixed steps `"euler"` (equation 7), `"midpoint"`, `"rk4"` (3/8 rule, as
            torchdiffeq), `"rk4_classic"` (equations 33 to 37), `"explicit_adams"` or
            `"implicit_adams"` (order 4); with adaptive steps `"dopri5"` (the paper's), `"bosh3"`
            or `"adaptive_heun"`; for terms with a matrix `"semi_implicit_euler"` (equation 8), for
            linear ones the exact `"uniformisation"`; or a solver object.
        step_size: length of a step, in units of `t`; the last step is cut to end at `T`. None: one
            step. Of methods with fixed steps.
        rtol, atol: the error of an adaptive step in the root mean square of
            `error_i / (atol + rtol |x_i|)` is at most 1; where `"implicit_adams"` ends its
            corrections. By default 1e-7 and 1e-9 in float64, 1e-5 and 1e-6 in float32, 1e-4
            both in float16, 1e-3 both in bfloat16. What the type cannot attain is raised, with a
            warning. What `"semi_implicit_euler"` and
            `"uniformisation"` leave out is their own `tol`, of the solver object.
        tol_scale, tol_convention: instead of both; `"released"`: atol = tol_scale · 1e-7, rtol =
            tol_scale · 1e-9, as GRAND's released code; `"paper"`: 1e-12 and 1e-6, as its text.
        adjoint: `"checkpoint"` keeps the state of each step, with Adams methods and
            `"adaptive_heun"` its slope too, and runs the step again in backward, `"direct"` keeps
            what every stage saves. Their gradients agree to rounding; neither differentiates the
            length of a step.
            `"continuous"`: the paper's adjoint equations, integrated backwards from the state of
            each step; their gradient is as good as their tolerance, and that of the continuous
            problem.
        adjoint_options: of `"continuous"`: own method, tolerances, seminorm.
        memory_limit: bytes that `"checkpoint"` may keep for backward at any time: it then keeps
            only some states and runs steps more often (binomial checkpointing), each once more in
            the forward pass, which `.stats` does not count.
        times: rising, within `[0, T]`: the states there are `.xs`. Between the ends of steps they
            are interpolated, by a quartic with adaptive methods and linearly with others.
        end: an adaptive step may end exactly at each output time (`"clamp"`), or pass it, the state
            there being interpolated (`"interp"`, as torchdiffeq).
        first_step: of an adaptive method; by default chosen from two evaluations of `f`.
        max_steps, max_nfe: attempted steps and evaluations after which the solve gives up.
        regularizers: penalties to integrate beside the state, by node, each from 0, with J = ∂f/∂x:
            `"kinetic"`, `½ mean_d f²`; `"directional"`, `½ mean_d (Jᵀf)²`; `"jacobian"`,
            `Σ_d (Jᵀε)²`, whose sum over the nodes estimates `‖J‖²` in the Frobenius norm; and
            `"divergence"`, `Σ_d ε (Jᵀε)`, which sums to an estimate of the trace of J. All but the
            first take second derivatives of `f`. Their error counts as the state's does. Not with
            methods that want a matrix.
        generator: of ε, random signs that are drawn once a solve; None: torch's default.
        observe: called with `t` and the state at 0 and after each step that counts. Under
            `torch.no_grad()`, without regularizers.

    Returns:
        `Solution` with `.x` (like `x0`), `.t`, `.stats`, `.status`, `.xs` and `.penalties`.
        Numerical failure is a status, not an error.

    `torch.compile` and `torch.export` make one program of a solve by the explicit methods with
    fixed steps, with `"direct"` or `"checkpoint"`; others choose what to do by values they read.
    `torch.func` and forward mode take methods for any f, `vmap` those with fixed steps; a solve
    within a transform keeps what every stage saves, as `"direct"` does.
    Differentiable by `x0` and by whatever the term holds.
    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """
    check_choice("adjoint", adjoint, get_args(Adjoint))
    if memory_limit is not None and adjoint != "checkpoint":
        raise ValueError(
            f"integrate: `memory_limit` must come with adjoint 'checkpoint', got {adjoint!r}."
        )
    check_choice("end", end, _ENDS)
    check_number("T", T, positive=False)
    for name, value in (("step_size", step_size), ("first_step", first_step)):
        if value is not None:
            check_number(name, value, positive=True)
    for name, count in (
        ("memory_limit", memory_limit),
        ("max_steps", max_steps),
        ("max_nfe", max_nfe),
    ):
        check_count(name, count)
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        got = str(x0.dtype) if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"integrate: `x0` must be a floating tensor, got {got}.")
    if x0.layout is not torch.strided:
        raise TypeError(f"integrate: `x0` must be dense, got {x0.layout}. Try .to_dense().")
    if x0.is_meta:
        raise ValueError("integrate: `x0` must hold values, got a tensor on meta.")
    T = float(T)
    wanted = check_times(times, T)
    rtol, atol = tolerances(x0.dtype, rtol, atol, tol_scale, tol_convention)
    if not isinstance(method, AbstractSolver):
        check_choice("method", method, tuple(METHODS))
    if observe is not None and (torch.is_grad_enabled() or regularizers):
        raise NotImplementedError(
            "integrate: `observe` must come under torch.no_grad() and with no regularizers. Ask "
            "for states with `times`, which are differentiable."
        )
    if torch.compiler.is_compiling():
        check_traceable(method, adjoint, memory_limit)
    term = term if isinstance(term, AbstractTerm) else FunctionTerm(term)
    if transforms_active():
        check_transformable(
            term,
            x0,
            method if isinstance(method, AbstractSolver) else METHODS[method](rtol, atol),
            method=method,
            adjoint=adjoint,
            memory_limit=memory_limit,
            regularizers=regularizers,
        )
        adjoint = "direct"
    solver = solver_of(method, rtol, atol, x0)
    if _is_planned(x0, solver, adjoint):
        term = term.planned(x0)

    beside = regularized(term, x0, solver, regularizers, generator) if regularizers else None
    if beside is not None and beside.needs_derivatives and memory_limit is not None:
        raise NotImplementedError(
            "integrate: `memory_limit` must come with no regularizers but kinetic, got more. "
            "Leave it out: one state a step is kept."
        )
    whole, state = beside or term, x0 if beside is None else beside.join(x0)
    if is_widened(solver, x0.dtype, abs(T) / step_size if step_size else 1.0):
        whole, state = WideTerm.of(whole, state)
    counted = CountedTerm(whole)
    if isinstance(solver, EmbeddedRungeKutta) and adjoint != "continuous":
        solver = solver.of(counted)
    problem = Problem(
        counted,
        state,
        sorted({0.0, T, *wanted}),
        solver=solver,
        step_size=step_size,
        ends=end == "clamp",
        first_step=first_step,
        max_steps=max_steps,
        max_nfe=max_nfe,
    )
    if observe is not None:
        call = observe
        result = problem.observed(lambda t, x: call(t, x.to(x0.dtype)))
    elif not torch.is_grad_enabled():
        result = problem.solve(ADJOINTS["direct"])
    elif adjoint == "continuous":
        result = continuous(problem, adjoint_options or ContinuousOptions(), x0.dtype)
    elif memory_limit is not None:
        result = checkpoint_within(problem, memory_limit)
    elif adjoint == "checkpoint" and beside is not None and beside.needs_derivatives:
        result = problem.solve(checkpoint_differentiating)
    elif adjoint == "checkpoint" and type(solver) is EmbeddedRungeKutta and solver.pair.is_fsal:
        result = replace(problem, solver=CheckpointedPair(solver)).solve(
            lambda step, x, carry: step(x, carry)
        )
    else:
        result = problem.solve(ADJOINTS[adjoint])
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
