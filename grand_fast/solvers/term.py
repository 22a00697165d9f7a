"""What is integrated: a vector field, and the matrix of one that is linear."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from grand_fast.ops import stage_update
from grand_fast.solvers.checks import OptionTypeError

Scale = float | Tensor  # a float, a scalar tensor, or one value per channel
Add = Sequence[tuple[float, Tensor]]
# (a, y, scale, add) → scale · A y + Σ c z, differentiable by all tensors, `a` the entries of A. It
# must not hold `a`: a solver keeps it for backward, where autograd keeps the entries.
Matrix = Callable[[Tensor, Tensor, Scale, Add], Tensor]


@dataclass(frozen=True, eq=False)
class Combination:
    """`Σ_s c_s y_s`, not yet added up: a term may do that in the pass that computes `f`."""

    terms: Sequence[tuple[float, Tensor]]  # at least one; no coefficient is 0

    def evaluate(self) -> Tensor:
        """The sum; `y` itself, not a copy, where it is all."""
        if len(self.terms) == 1 and self.terms[0][0] == 1.0:
            return self.terms[0][1]
        return stage_update(self.terms)


class AbstractTerm(ABC):
    """The right-hand side of `dx/dt = f(t, x)`.

    A term whose kernel can add `tau · f` to a tensor in the same pass overrides `axpy`; every
    solver then gains from it without knowing. What a method returns may lie in memory that its next
    call writes again: solvers copy that, and do not copy what is new.

    returns_new: what is returned is like `x`, and known to nobody else: no solver need look.
    """

    returns_new = False

    @abstractmethod
    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f(t, x)`, shaped like `x`."""

    def __call__(self, t: float, x: Tensor) -> Tensor:
        """`f(t, x)`: a term stands wherever a function is asked for."""
        return self.vf(t, x)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that `f` depends on beside `x` and that may want a gradient.

        Only the continuous adjoint asks, which has no graph of the solve to find them in.
        """
        raise NotImplementedError(
            f"integrate: `adjoint` 'continuous' needs the tensors that the term depends on, and "
            f"{type(self).__name__} does not name them. Define its `tensors()`, or pass "
            "adjoint_params."
        )

    def split_constant(self) -> tuple["AbstractTerm", Tensor | None]:
        """A term g and a tensor c like the state with `f(t, x) = g(t, x) + c`; by default f, None.

        A step by slopes adds c to each of its combinations: backward then finds the gradient by c
        in one pass a step, not in one an evaluation.
        """
        return self, None

    def planned(self, x: Tensor) -> "AbstractTerm":
        """The same f for one solve, whose states are like `x`; by default itself.

        What every evaluation would check, look up or pack again may be done here, once. A method
        may call it with other tensors, and under torch.func, all the same.
        """
        return self

    def detached(self) -> Self:
        """A copy whose own tensors are leaves, in the order of `tensors()`.

        Where one of them was computed from another, as the weights of attention from the source,
        the continuous adjoint needs the gradient by each with the others held.
        """
        term = copy(self)
        for name, value in vars(self).items():
            setattr(term, name, _detached(value))
        return term

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f(t, x)`."""
        return stage_update([*base.terms, (tau, check_field(self.vf(t, x), x))])

    def freeze(self, t: float, x: Tensor) -> "AbstractLinearTerm":
        """The term with its matrix held at the state `x`, for methods that solve linear systems."""
        raise OptionTypeError(
            f"integrate: `term` must have a matrix that can be held constant, `freeze`, for "
            f"semi_implicit_euler, got {type(self).__name__}. Use an explicit method such as rk4."
        )

    def linear(self) -> "AbstractLinearTerm":
        """The term itself, if its matrix is constant."""
        raise OptionTypeError(
            f"integrate: `term` must be linear, with a constant matrix, for uniformisation, got "
            f"{type(self).__name__}. Use semi_implicit_euler or rk4, or GRAND with variant='l'."
        )


def _detached(value: Any) -> Any:
    if isinstance(value, AbstractTerm):
        return value.detached()
    if isinstance(value, list | tuple):
        return [_detached(v) for v in value]
    if isinstance(value, Tensor) and not value.is_leaf:
        return value.detach().requires_grad_()
    return value


def check_field(f: Tensor, x: Tensor, given: str = "integrate: `term`") -> Tensor:
    """`f`, which is like `x`; of any float type where autocast brings them to one.

    given: what returned it, for messages.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(f, Tensor):
        got = type(f).__name__
        raise TypeError(f"{given} must return f as a Tensor, got {got}.")
    is_other_type = f.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
    if f.shape != x.shape or is_other_type:
        raise ValueError(
            f"{given} must return f like x, {x.dtype} {list(x.shape)}, "
            f"got {f.dtype} {list(f.shape)}."
        )
    if f.device != x.device:
        raise ValueError(
            f"{given} must return f where x is, on {x.device}, got {f.device}. "
            "Move it with .to(x.device)."
        )
    return f


class AbstractLinearTerm(AbstractTerm):
    """`f = alpha (A x − x) + beta source` with constant A.

    a:             the entries of A, whichever way `matrix` wants them.
    alpha, beta:   scales; no source where `beta` is None.
    source:        like `x`.
    matrix:        the product with A.
    """

    a: Tensor
    alpha: Scale
    beta: Scale | None
    source: Tensor | None
    matrix: Matrix

    def product(self, y: Tensor, scale: Scale, add: Add = ()) -> Tensor:
        """`scale · A y + Σ c z` over the pairs `(c, z)` of `add`, like `y`."""
        return self.matrix(self.a, y, scale, add)

    def freeze(self, t: float, x: Tensor) -> "AbstractLinearTerm":
        """Itself: its matrix is constant."""
        return self

    def linear(self) -> "AbstractLinearTerm":
        """Itself: its matrix is constant."""
        return self


class FunctionTerm(AbstractTerm):
    """A plain function `f(t, x)` as a term."""

    def __init__(self, func: Callable[[float, Tensor], Tensor]) -> None:
        self.func = func

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f(t, x)`."""
        return self.func(t, x)

    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters, if the function is a module."""
        if isinstance(self.func, nn.Module):
            return tuple(self.func.parameters())
        return super().tensors()


@dataclass(eq=False)
class Counter:
    """Evaluations of f, in an object that outlives the term without holding its tensors."""

    nfe: int = 0
