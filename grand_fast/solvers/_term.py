"""What is integrated: a vector field, seen by the solvers through two methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from grand_fast.ops import stage_update


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
    solver then gains from it without knowing.
    """

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

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f(t, x)`."""
        f = self.vf(t, x)
        if f.shape != x.shape or f.dtype != x.dtype:
            raise ValueError(
                f"integrate: `term` must return f like x, {x.dtype} {list(x.shape)}, "
                f"got {f.dtype} {list(f.shape)}."
            )
        return stage_update([*base.terms, (tau, f)])


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


class CountedTerm(AbstractTerm):
    """A term that counts its evaluations in `nfe`."""

    def __init__(self, term: AbstractTerm) -> None:
        self.term = term
        self.nfe = 0

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the term."""
        return self.term.tensors()

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f(t, x)`, counted."""
        self.nfe += 1
        return self.term.vf(t, x)

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f(t, x)`, counted once."""
        self.nfe += 1
        return self.term.axpy(t, x, base, tau)
