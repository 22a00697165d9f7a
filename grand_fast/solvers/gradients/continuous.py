"""The continuous adjoint: Pontryagin's equations integrated backwards, as the paper does.

With a(t) the gradient by x(t): da/dt = −(∂f/∂x)ᵀ a, dθ/dt = −(∂f/∂θ)ᵀ a. The state is integrated
backwards beside them, which for diffusion is ill-posed: its modes that decay fastest grow fastest.
Here each step of the forward solve is kept and the state put back on it, so that errors cannot grow
over more than one step. The gradient is that of the continuous problem, not of the solve.
Reference: GRAND (Chamberlain et al. 2021), section 4; Chen et al. 2018, appendix B.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from grand_fast.ops.backends import is_batched
from grand_fast.ops.one_by_one import one_by_one
from grand_fast.solvers.checks import check_choice, check_number
from grand_fast.solvers.counted import CountedTerm
from grand_fast.solvers.gradients.checkpoint import ADJOINTS, autocast_of
from grand_fast.solvers.half_precision import WideTerm, is_widened
from grand_fast.solvers.methods.embedded_pairs import EmbeddedRungeKutta
from grand_fast.solvers.methods.table import METHODS, solver_of
from grand_fast.solvers.solution import SolveError, Status
from grand_fast.solvers.solve import ContinuousOptions
from grand_fast.solvers.solver import AbstractAdaptiveSolver, AbstractSolver
from grand_fast.solvers.term import AbstractTerm
from grand_fast.solvers.time_loop import Problem, Result
from grand_fast.solvers.tolerances import is_narrow, tolerances


class AdjointTerm(AbstractTerm):
    """(x, a, θ) in one flat state, in backward time `s = t1 − t`."""

    def __init__(self, term: AbstractTerm, shape: torch.Size, t1: float,
                 params: Sequence[Tensor]) -> None:  # fmt: skip
        self.term, self.shape, self.t1, self.params = term, shape, t1, params
        self.sizes = (shape.numel(), shape.numel(), *(t.numel() for t in params))

    def vf(self, t: float, x: Tensor) -> Tensor:
        """−f, (∂f/∂x)ᵀ a, (∂f/∂θ)ᵀ a."""
        state, a, *_ = x.split(self.sizes)
        with torch.enable_grad():
            y = state.view(self.shape).detach().requires_grad_()
            f = self.term.vf(self.t1 - t, y)
            inputs = (y, *self.params)
            grads: Sequence[Tensor | None] = (None,) * len(inputs)
            if f.requires_grad:
                grads = torch.autograd.grad(f, inputs, a.view(self.shape), allow_unused=True)
        parts = [
            torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)
        ]
        return torch.cat([-f.detach().flatten(), *(p.flatten() for p in parts)])


# Integrates from 0 over a time, from a flat state
Backwards = Callable[[AdjointTerm, Tensor, float], Tensor]


class ContinuousAdjoint(Function):
    """The states of a solve; backward integrates from each to the one before.

    Inputs: the term and its tensors, as leaves; the backward integrator; `solve` (initial state →
    times and states, without a graph, and which of them are given out); the initial state, and the
    tensors that the leaves stand for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        term: AbstractTerm,
        leaves: Sequence[Tensor],
        backwards: Backwards,
        solve: Callable[[Tensor], tuple[list[float], list[Tensor], list[int]]],
        x0: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """The states that are given out."""
        times, states, wanted = solve(x0)
        ctx.save_for_backward(*states, *tensors)
        ctx.term, ctx.leaves, ctx.backwards = term, leaves, backwards
        ctx.times, ctx.wanted, ctx.autocast = times, wanted, autocast_of(x0)
        return tuple(states[i].clone() for i in wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By the initial state and the tensors, from the gradients by those states."""
        if any(is_batched(g) for g in grads):
            return tuple(one_by_one(partial(ContinuousAdjoint.backward, ctx), *grads))
        times = ctx.times
        states = ctx.saved_tensors[: len(times)]
        given = list(zip(ctx.wanted, grads, strict=True))
        # Only what wants a gradient is integrated beside the state.
        needed = ctx.needs_input_grad[5:]
        wanted = [t for t, n in zip(ctx.leaves, needed, strict=True) if n]
        a = torch.zeros_like(states[0])
        theta = [torch.zeros_like(t) for t in wanted]
        for i in range(len(times) - 1, -1, -1):
            for _, grad in (pair for pair in given if pair[0] == i):
                a = a + grad
            if i == 0:
                break
            term = AdjointTerm(ctx.term, a.shape, times[i], wanted)
            flat = torch.cat([t.flatten() for t in (states[i], a, *theta)])
            with ctx.autocast:
                flat = ctx.backwards(term, flat, times[i] - times[i - 1])
            _, a, *theta = flat.split(term.sizes)
            a = a.view_as(states[0])
            theta = [t.view_as(w) for t, w in zip(theta, wanted, strict=True)]
        found = iter(theta)
        return None, None, None, None, a, *(next(found) if n else None for n in needed)


def continuous(problem: Problem, options: ContinuousOptions, dtype: torch.dtype) -> Result:
    """The solve with its gradient by the continuous adjoint; `f` returns what is of `dtype`."""
    kept: list[Result] = []

    def solve(x0: Tensor) -> tuple[list[float], list[Tensor], list[int]]:
        result, at = problem.record(x0)
        kept.append(result)
        # An output time that an adaptive step passed is kept as well.
        at |= dict(zip(problem.stops, result.found, strict=False))
        known = sorted(at)
        return known, [at[t] for t in known], [known.index(t) for t in _reached(problem, result)]

    if options.params is None:
        term, tensors = problem.term.detached(), problem.term.tensors()
        # One that two parts of a term hold is one leaf, and has one gradient
        own = {id(leaf): (leaf, t) for leaf, t in zip(term.tensors(), tensors, strict=True)}
        leaves, tensors = zip(*own.values(), strict=True) if own else ((), ())
    else:
        term, tensors = problem.term, tuple(options.params)
        leaves = tensors
    backwards = _integrator(problem, options, dtype)
    given = ContinuousAdjoint.apply(term, leaves, backwards, solve, problem.x0, *tensors)
    result = kept[0]
    at_times = {problem.stops[0]: problem.x0}
    at_times |= zip(_reached(problem, result), given, strict=True)
    found = [at_times[t] for t in problem.stops[: len(result.found)]]
    return result._replace(found=found, x=at_times[result.t])


def _reached(problem: Problem, result: Result) -> list[float]:
    """The times after the start whose states are asked for."""
    return sorted({*problem.stops[: len(result.found)], result.t} - {problem.stops[0]})


def _integrator(problem: Problem, options: ContinuousOptions, dtype: torch.dtype) -> Backwards:
    forward, size = problem.solver, problem.x0.numel()
    method = options.method or ("dopri5" if forward.wants_matrix else forward)
    if not isinstance(method, AbstractSolver):
        known = tuple(m for m, make in METHODS.items() if not make(1.0, 1.0).wants_matrix)
        check_choice("adjoint_options.method", method, known)
    if options.step_size is not None:
        check_number("adjoint_options.step_size", options.step_size, positive=True)
    rtol, atol = options.rtol, options.atol
    if options.tol_scale is None and isinstance(forward, AbstractAdaptiveSolver):
        rtol = float(forward.rtol) if rtol is None else rtol
        atol = float(forward.atol) if atol is None else atol
    rtol, atol = tolerances(dtype, rtol, atol, options.tol_scale, options.tol_convention)

    # The largest of the parts counts, as with torchdiffeq: each does whatever its size.
    parts = [slice(size), slice(size, 2 * size)]
    has_begun = False

    def backwards(term: AdjointTerm, flat: Tensor, tau: float) -> Tensor:
        nonlocal has_begun
        solver = solver_of(
            method, rtol, atol, flat, dtype=dtype if is_narrow(dtype) else None, warns=not has_begun
        )
        has_begun = True
        if isinstance(solver, EmbeddedRungeKutta):
            further = (
                [] if options.seminorm or flat.numel() == 2 * size else [slice(2 * size, None)]
            )
            solver = EmbeddedRungeKutta(
                solver.pair, rtol=solver.rtol, atol=solver.atol, parts=[*parts, *further]
            )
        whole: AbstractTerm = term
        state = flat
        if is_widened(solver, flat.dtype, abs(tau) / (options.step_size or abs(tau))):
            whole, state = WideTerm.of(term, flat)
        result = Problem(
            CountedTerm(whole), state, [0.0, tau], solver=solver, step_size=options.step_size,
            first_step=tau,
        ).solve(ADJOINTS["direct"])  # fmt: skip
        if result.status is not Status.SUCCESS:
            raise SolveError(
                f"integrate: adjoint 'continuous': {result.status.name} at t = "
                f"{term.t1 - result.t:g}: {result.status.value}. "
                "Or use adjoint='checkpoint', which is exact."
            )
        return result.x.to(flat.dtype)

    return backwards
