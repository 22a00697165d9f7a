"""Semi-implicit Euler, the paper's equation 8: stable for every step, of order 1."""

import math
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from grand_fast.ops.backends import is_batched
from grand_fast.ops.checks import check_choice
from grand_fast.ops.one_by_one import one_by_one
from grand_fast.solvers.checks import check_share
from grand_fast.solvers.combination import Add, Combination, Matrix, Scale
from grand_fast.solvers.methods.linear_systems import LinearSolver, LinearSystem, Product, solve
from grand_fast.solvers.solver import AbstractSolver, Carry, Step, combine
from grand_fast.solvers.term import AbstractLinearTerm, AbstractTerm


class SemiImplicitEuler(AbstractSolver):
    """`((1 + tau alpha) I − tau alpha A(x)) y = x + tau beta x0`, the attention taken at `x`.

    Args:
        iterations: of the fixed point `y ← (x + tau (alpha A y + beta x0)) / (1 + tau alpha)`,
            from `y = x`. Each is a convex combination, so that any number of them is stable and
            obeys the maximum principle. None: as many as `tol` takes.
        tol: residual over the right-hand side, both in the root mean square over the state. At
            least about half the rounding unit times `1 + tau alpha`.
        linear_solver: `"fixed_point"`; `"bicgstab"`, which takes fewer products for large steps;
            `"auto"`: the former up to `tau alpha = 2`. With `iterations` always the fixed point.

    Gradients are exact: with `iterations` those of the iterates, which autograd keeps; else those
    of the solution, by one linear system with the transposed matrix, to `tol`.
    Reference: GRAND (Chamberlain et al. 2021), equation 8 and theorem 2.
    """

    order = 1
    wants_matrix = True

    def __init__(
        self, iterations: int | None = None, tol: float = 1e-6, linear_solver: LinearSolver = "auto"
    ) -> None:
        if iterations is not None and (
            isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1
        ):
            raise ValueError(
                f"SemiImplicitEuler: `iterations` must be an int of at least 1, got {iterations!r}."
            )
        check_share("SemiImplicitEuler", "tol", tol)
        known = get_args(LinearSolver)
        check_choice("SemiImplicitEuler", "linear_solver", linear_solver, known=known)
        if iterations is not None and linear_solver == "bicgstab":
            raise ValueError(
                "SemiImplicitEuler: `iterations` must come with the fixed point, got 'bicgstab'. "
                "Give it a `tol`."
            )
        self.iterations, self.tol, self.linear_solver = iterations, float(tol), linear_solver

    def step(self, term: AbstractTerm, t: float, x: Tensor, tau: float, carry: Carry) -> Step:
        """One linear system with the matrix at `x`."""
        frozen = term.freeze(t, x)
        if self.iterations is not None:
            system = _system(frozen, x, tau, _checked(tau * frozen.alpha))
            y = x
            for _ in range(self.iterations):
                y = system.iterate(y)
            return Step(y)
        with torch.no_grad():
            s = tau * frozen.alpha
            if isinstance(s, Tensor) and s.numel() == 1:
                s = float(s)  # products then add in the same pass
            s = _checked(s)
        if not isinstance(s, Tensor) and not math.isfinite(s):
            return Step(x * s)  # which is not finite either
        with torch.no_grad():
            system = _system(frozen, x, tau, s)
            y = solve(system, x, tol=self.tol, linear_solver=self.linear_solver)
        held = (x, frozen.a, frozen.alpha, frozen.beta, frozen.source)
        if torch.is_grad_enabled() and any(isinstance(h, Tensor) and h.requires_grad for h in held):
            # Equal to y, with the gradients of the equation that y solves
            z = frozen.axpy(t + tau, y, Combination([(1.0, x)]), tau)
            y = _SolutionFunction.apply(z, y, frozen.a, s, frozen.matrix, self)
        return Step(y)


def _system(frozen: AbstractLinearTerm, x: Tensor, tau: float, s: Scale) -> LinearSystem:
    """`(1 + s) y − s A y = x + tau beta source` with `s = tau alpha`."""
    beta, source = frozen.beta, frozen.source
    if beta is not None and source is not None:
        if isinstance(beta, Tensor):
            x = combine([(1.0, x), (tau, (beta * source).to(x.dtype))])
        else:
            x = combine([(1.0, x), (tau * beta, source)])
    if isinstance(s, Tensor):
        return LinearSystem(frozen.product, s, (1.0, (x / (1 + s)).to(x.dtype)))
    return LinearSystem(frozen.product, s, (1 / (1 + s), x))


def _checked(s: Scale) -> Scale:
    if not isinstance(s, Tensor) and s < 0:
        raise ValueError(
            "integrate: `alpha` must be at least 0 for semi_implicit_euler, got tau · alpha = "
            f"{s:g}."
        )
    return s


class _SolutionFunction(Function):
    """The solution `y` of `y = z(y, …)`: a gradient reaches `z` through `(I − ∂z/∂y)⁻ᵀ`."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, y: Tensor, a: Tensor, s: Scale, matrix: Any, solver: SemiImplicitEuler
    ) -> Tensor:
        ctx.save_for_backward(a, s if isinstance(s, Tensor) else None)
        ctx.s = None if isinstance(s, Tensor) else s
        ctx.matrix, ctx.solver = matrix, solver
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, s = ctx.saved_tensors
        s = ctx.s if s is None else s

        def solved(dy: Tensor) -> tuple[Tensor]:
            c = (1.0, (dy / (1 + s)).to(dy.dtype)) if isinstance(s, Tensor) else (1 / (1 + s), dy)
            system = LinearSystem(_transposed(ctx.matrix, a, dy), s, c)
            tol, linear_solver = ctx.solver.tol, ctx.solver.linear_solver
            return (solve(system, dy, tol=tol, linear_solver=linear_solver),)

        (dz,) = one_by_one(solved, dy) if is_batched(dy) else solved(dy)
        return dz, None, None, None, None, None


def _transposed(matrix: Matrix, a: Tensor, like: Tensor) -> Product:
    """The product with Aᵀ, as the backward of that with A."""
    with torch.enable_grad():
        y = torch.zeros_like(like).requires_grad_()
        ay = matrix(a, y, 1.0, ())

    def product(y_t: Tensor, scale: Scale, add: Add) -> Tensor:
        (at_y,) = torch.autograd.grad(ay, y, y_t, retain_graph=True)
        if isinstance(scale, Tensor):
            return combine([(1.0, (scale * at_y).to(y_t.dtype)), *add])
        return combine([(scale, at_y), *add])

    return product
