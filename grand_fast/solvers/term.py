"""What is integrated: a vector field, and the matrix of one that is linear."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from grand_fast.ops import stage_update
from grand_fast.solvers.checks import OptionTypeError
from grand_fast.solvers.combination import (
    AbstractAddend,
    Add,
    Combination,
    Matrix,
    Part,
    Scale,
    check_field,
    pair,
    scaled,
)


class AbstractTerm(AbstractAddend):
    """The right-hand side of `dx/dt = f(t, x)`.

    Terms and functions of t and x add up, by `+` and `-`; `*` takes a float, or a tensor that
    multiplies the state: a scalar, or one value per channel.

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

    def _sum(self, parts: Sequence[Part]) -> "Sum":
        return Sum(parts)

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


class AbstractFusedTerm(AbstractTerm):
    """A term of which `axpy` is all: `f` is that, added to nothing."""

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f`, shaped like `x`."""
        return self.axpy(t, x, Combination([]), 1.0)


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


class Constant(AbstractTerm):
    """`f(t, x) = c`, like `x`."""

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`c` itself."""
        return self.c

    def tensors(self) -> tuple[Tensor, ...]:
        """That."""
        return (self.c,)

    def split_constant(self) -> tuple[AbstractTerm, Tensor]:
        """Nothing, and `c`."""
        return Sum([]), self.c


def as_term(f: AbstractTerm | Callable[[float, Tensor], Tensor]) -> AbstractTerm:
    """A term as it is; a function as a term."""
    return f if isinstance(f, AbstractTerm) else FunctionTerm(f)


class Sum(AbstractFusedTerm):
    """`f = Σ c · s · g`, which `+` and `*` make of terms g.

    Those that have an `axpy`, and are scaled by floats alone, add themselves to what stands before
    them, one after the other; the values of all others go into the first of these passes.

    semi_implicit_euler takes what has no matrix, as a reaction has none, at the start of each step.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts: list[Part] = []
        for c, scales, f in parts:
            inner = f.parts if isinstance(f, Sum) else [(1.0, (), as_term(f))]
            self.parts += [(c * k, (*scales, *further), g) for k, further, g in inner]
        self.parts.sort(key=_is_fused)
        self.returns_new = any(_is_fused(p) and p[2].returns_new for p in self.parts[-1:])

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the terms, and what multiplies them."""
        return tuple(t for _, scales, g in self.parts for t in (*scales, *g.tensors()))

    def planned(self, x: Tensor) -> "Sum":
        """The same of planned terms, with the sum of all constants."""
        rest, constant = self.split_constant()
        parts: list[Part] = [(c, scales, g.planned(x)) for c, scales, g in rest.parts]
        if constant is not None:
            parts.append((1.0, (), Constant(check_field(constant, x))))
        return Sum(parts)

    def split_constant(self) -> tuple["Sum", Tensor | None]:
        """The terms without their constants, and the sum of those."""
        rest, constants = list[Part](), list[tuple[float, Tensor]]()
        for c, scales, term in self.parts:
            g, constant = term.split_constant()
            rest.append((c, scales, g))
            if constant is not None:
                constants.append((c, scaled(constant, scales)))
        return (Sum(rest), Combination(constants).evaluate()) if constants else (self, None)

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`."""
        pairs = list(base.terms)
        for c, scales, g in self.parts:
            if _is_fused((c, scales, g)):
                pairs = [(1.0, check_field(g.axpy(t, x, Combination(pairs), tau * c), x))]
            else:
                pairs.append((tau * c, scaled(check_field(g.vf(t, x), x), scales)))
        return Combination(pairs).evaluate() if pairs else torch.zeros_like(x)

    def freeze(self, t: float, x: Tensor) -> AbstractLinearTerm:
        """The one that has a matrix with that held; the values of the others at `x` as source."""
        held = [part for part in self.parts if type(part[2]).freeze is not AbstractTerm.freeze]
        c, scales, g = self._only(held)
        rest = [part for part in self.parts if part is not held[0]]
        return HeldTerm(g.freeze(t, x), c, scales, Sum(rest).vf(t, x) if rest else None)

    def linear(self) -> AbstractLinearTerm:
        """The one that is linear, with the sum of all constants as source."""
        rest, constant = self.split_constant()
        c, scales, g = self._only([(c, s, g.linear()) for c, s, g in rest.parts])
        return HeldTerm(g, c, scales, constant)

    def _only(self, parts: Sequence[Part]) -> Part:
        if len(parts) != 1:
            names = " + ".join(type(g).__name__ for _, _, g in self.parts)
            raise OptionTypeError(
                f"integrate: `term` must have one part with a matrix, got {len(parts)} in {names}. "
                "Use an explicit method such as rk4."
            )
        return parts[0]


class HeldTerm(AbstractFusedTerm, AbstractLinearTerm):
    """`c · s · g + further` of a linear term g."""

    def __init__(
        self, g: AbstractLinearTerm, c: float, scales: Sequence[Tensor], further: Tensor | None
    ) -> None:
        factor: Scale = c
        for scale in scales:
            factor = scale * factor
        self.a, self.matrix, self.alpha = g.a, g.matrix, factor * g.alpha
        pairs = [] if further is None else [(1.0, further)]
        if g.beta is not None and g.source is not None:
            pairs.append(pair(factor * g.beta, g.source))
        self.source = Combination(pairs).evaluate() if pairs else None
        self.beta = 1.0 if pairs else None

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`, by a product with the matrix."""
        scale = tau * self.alpha
        source = [] if self.source is None else [(tau, self.source)]
        return self.product(x, scale, [*base.terms, *source, pair(-scale, x)])


def _is_fused(part: Part) -> bool:
    return len(part[1]) == 0 and type(part[2]).axpy is not AbstractTerm.axpy


@dataclass(eq=False)
class Counter:
    """Evaluations of f, in an object that outlives the term without holding its tensors."""

    nfe: int = 0
