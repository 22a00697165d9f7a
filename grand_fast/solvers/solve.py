"""`Solve`: what a solve is, declared once for `integrate`, the models and the command line."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from grand_fast.ops.backends import is_mapped
from grand_fast.solvers.checks import OptionValueError, check_choice, check_count, check_number
from grand_fast.solvers.methods.table import METHODS, Method
from grand_fast.solvers.options import option
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.term import AbstractTerm
from grand_fast.solvers.tolerances import Convention, tolerances

Adjoint = Literal["auto", "direct", "checkpoint", "continuous"]
Regularizer = Literal["kinetic", "directional", "jacobian", "divergence"]
_option = partial(option, group="solver")
SAME_GRADIENTS = frozenset({"auto", "direct", "checkpoint"})  # to rounding
_CHECKPOINTS = ("auto", "checkpoint")
# Methods whose steps go the same way whatever the values of the state
_TRACEABLE = ("euler", "midpoint", "rk4", "rk4_classic", "explicit_adams")


@dataclass(frozen=True)
class ContinuousOptions:
    """How the adjoint equations are integrated; what is None is as in the forward solve.

    method: a name or a solver object; after a method that wants a matrix, which the adjoint
        equations do not have, `"dopri5"`; rtol, atol, or tol_scale with tol_convention: as in
        `integrate`; step_size: of a method with fixed steps, None: the forward solve's steps.
    seminorm: the gradients by parameters do not count in the error, which saves evaluations.
    params: tensors to be differentiated by; None: those that the term names.
    """

    method: str | AbstractSolver | None = None
    rtol: float | None = None
    atol: float | None = None
    tol_scale: float | None = None
    tol_convention: Convention = "released"
    step_size: float | None = None
    seminorm: bool = True
    params: Sequence[Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Solve:
    """How `dx/dt = f(t, x)` is integrated from `x(0)` to `x(T)`, and how that is differentiated.

    `integrate`, `nn.GRAND` and `nn.GRANDConv` take it whole, as `solve=Solve(…)`, or its fields by
    keyword, which win over those of a whole one.

    Args:
        method: with fixed steps `"euler"` (equation 7), `"midpoint"`, `"rk4"` (3/8 rule, as
            torchdiffeq), `"rk4_classic"` (equations 33 to 37), `"explicit_adams"` or
            `"implicit_adams"` (order 4); with adaptive steps `"dopri5"` (the paper's), `"bosh3"`
            or `"adaptive_heun"`; for terms with a matrix `"semi_implicit_euler"` (equation 8), for
            linear ones the exact `"uniformisation"`; or a solver object.
        T: end time, at least 0, in the units of `t`; at 0 the result is a copy of `x(0)`.
        step_size: length of a step, in units of `t`; the last step is cut to end at `T`. None: one
            step, the default of `integrate` by keyword, as of torchdiffeq; 1 by default in a
            `Solve` and in models. Does nothing where the method chooses its steps.
        rtol, atol: the error of an adaptive step in the root mean square of
            `error_i / (atol + rtol |x_i|)` is at most 1; where `"implicit_adams"` ends its
            corrections. By default 1e-7 and 1e-9 in float64, 1e-5 and 1e-6 in float32, 1e-4
            both in float16, 1e-3 both in bfloat16. What the type cannot attain is raised, with a
            warning. What `"semi_implicit_euler"` and
            `"uniformisation"` leave out is their own `tol`, of the solver object.
        tol_scale, tol_convention: instead of both; `"released"`: atol = tol_scale · 1e-7, rtol =
            tol_scale · 1e-9, as GRAND's released code; `"paper"`: 1e-12 and 1e-6, as its text.
        adjoint: `"direct"` keeps what every stage saves, `"checkpoint"` the state of each step,
            with Adams methods and `"adaptive_heun"` its slope too, and runs the step again in
            backward. `"auto"` is direct while what the steps keep fits into a quarter of the memory
            that is free when the solve begins, and keeps checkpoints after that; `.stats.adjoint`
            tells. It is `"checkpoint"` in compiled programs, with regularizers but kinetic, and
            within hooks for saved tensors. Gradients agree to rounding; none differentiates the
            length of a step.
            `"continuous"`: the paper's adjoint equations, integrated backwards from the state of
            each step; their gradient is as good as their tolerance, and that of the continuous
            problem.
        tol_scale_adjoint, adjoint_method: tolerances and method of `"continuous"`; by default those
            of the forward solve.
        adjoint_options: instead, of `"continuous"`: own method, tolerances, seminorm.
        memory_limit: bytes that checkpoints may take for backward at any time: it then keeps
            only some states and runs steps more often (binomial checkpointing), each once more in
            the forward pass, which `.stats` does not count.
        first_step: of an adaptive method; by default chosen from two evaluations of `f`.
        max_steps, max_nfe: attempted steps and evaluations after which the solve gives up.
        regularizers: penalties to integrate beside the state, by node, each from 0, with J = ∂f/∂x:
            `"kinetic"`, `½ mean_d f²`; `"directional"`, `½ mean_d (Jᵀf)²`; `"jacobian"`,
            `Σ_d (Jᵀε)²`, whose sum over the nodes estimates `‖J‖²` in the Frobenius norm; and
            `"divergence"`, `Σ_d ε (Jᵀε)`, which sums to an estimate of the trace of J. All but the
            first take second derivatives of `f`. Their error counts as the state's does. Not with
            methods that want a matrix. Models integrate them while training.

    Values are checked where they are used.
    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """

    method: Method | AbstractSolver = _option("rk4", "how the diffusion is integrated")
    T: float = _option(1.0, "diffusion time", low=0)
    step_size: float | None = _option(1.0, "of methods with fixed steps", above=0)
    rtol: float | None = _option(None, "relative tolerance where steps are chosen", above=0)
    atol: float | None = _option(None, "absolute tolerance there", above=0)
    tol_scale: float | None = _option(
        None, "instead of both: atol = 1e-7 X, rtol = 1e-9 X", above=0
    )
    tol_convention: Convention = "released"
    adjoint: Adjoint = _option("auto", "gradient of the solve")
    tol_scale_adjoint: float | None = _option(
        None, "tolerance scale of adjoint continuous", above=0, needs=("adjoint", "continuous")
    )
    adjoint_method: Method | AbstractSolver | None = None
    adjoint_options: ContinuousOptions | None = None
    memory_limit: int | None = _option(
        None, "bytes that checkpoints may take", low=1, needs=("adjoint", *_CHECKPOINTS)
    )
    first_step: float | None = None
    max_steps: int | None = None
    max_nfe: int | None = _option(None, "evaluations of f after which a solve gives up", low=1)
    regularizers: Sequence[Regularizer] = ()

    def check(self) -> None:
        """Each value by itself, but for those that need the state's type.

        Raises:
            TypeError, ValueError: names it, what was expected and what came.
        """
        check_choice("adjoint", self.adjoint, get_args(Adjoint))
        if self.memory_limit is not None and self.adjoint not in _CHECKPOINTS:
            raise OptionValueError(
                f"integrate: `memory_limit` must come with adjoint 'auto' or 'checkpoint', got "
                f"{self.adjoint!r}."
            )
        if self.adjoint_options is not None and (self.adjoint_method or self.tol_scale_adjoint):
            raise OptionValueError(
                "integrate: `adjoint_options` must come without `adjoint_method` and "
                "`tol_scale_adjoint`, which it holds too, got both."
            )
        if self.adjoint_method is not None and not isinstance(self.adjoint_method, AbstractSolver):
            check_choice("adjoint_method", self.adjoint_method, tuple(METHODS))
        check_number("T", self.T, positive=False)
        for name in ("step_size", "first_step"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), positive=True)
        for name in ("memory_limit", "max_steps", "max_nfe"):
            check_count(name, getattr(self, name))
        if not isinstance(self.method, AbstractSolver):
            check_choice("method", self.method, tuple(METHODS))

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """`rtol` and `atol` for states of a type."""
        return tolerances(dtype, self.rtol, self.atol, self.tol_scale, self.tol_convention)

    def continuous(self) -> ContinuousOptions:
        """The options of adjoint `"continuous"`: its own, or from `adjoint_method` and so on."""
        return self.adjoint_options or ContinuousOptions(
            method=self.adjoint_method,
            tol_scale=self.tol_scale_adjoint,
            tol_convention=self.tol_convention,
        )

    def check_traceable(self) -> None:
        """A compiler can make one program of the solve.

        Raises:
            NotImplementedError: it reads values to choose its steps, as no program can.
        """
        if isinstance(self.method, str) and self.method not in _TRACEABLE:
            name, known, got = "method", ", ".join(_TRACEABLE), str(self.method)
        elif self.adjoint == "continuous":
            name, known, got = "adjoint", "auto, direct, checkpoint", str(self.adjoint)
        elif self.memory_limit is not None:
            name, known, got = "memory_limit", "None", str(self.memory_limit)
        else:
            return
        raise NotImplementedError(
            f"integrate: `{name}` must be one of {known} in a compiled or exported program, got "
            f"{got}: others choose what to do by values. Compile without fullgraph, or the vector "
            f"field alone."
        )

    def check_transformable(self, term: AbstractTerm, x0: Tensor, solver: AbstractSolver) -> None:
        """torch.func can transform the solve; it then keeps what every stage saves.

        Raises:
            NotImplementedError: it reads values, or computes gradients within itself.
        """
        where = "under torch.func and forward mode"
        name, got = "method", str(self.method)
        if isinstance(self.method, AbstractSolver):
            got = type(self.method).__name__
        if self.adjoint == "continuous":
            name, expected, got = (
                "adjoint",
                f"be 'auto', 'direct' or 'checkpoint' {where}",
                self.adjoint,
            )
        elif self.memory_limit is not None:
            name, expected, got = "memory_limit", f"be None {where}", str(self.memory_limit)
        elif any(penalty != "kinetic" for penalty in self.regularizers):
            name, expected = "regularizers", f"be kinetic alone {where}"
            got = ", ".join(self.regularizers)
        elif solver.wants_matrix:
            expected = f"take any f, as rk4 and dopri5 do, {where}"
        elif solver.is_adaptive and _is_mapped(term, x0):
            expected = "have fixed steps, as rk4 has, where torch.func.vmap maps over the solve"
        else:
            return
        raise NotImplementedError(f"integrate: `{name}` must {expected}, got {got}.")


def _is_mapped(term: AbstractTerm, x0: Tensor) -> bool:
    tensors: tuple[Tensor, ...] = ()
    with suppress(NotImplementedError):  # a term that does not name its tensors
        tensors = term.tensors()
    return any(is_mapped(t) for t in (x0, *tensors))
