"""States of half precision: `f` sees them in their own type, a solve adds up in float32.

Added up in their own type, short steps change a state by less than it resolves: they come to
nothing. Norms of what is small or large leave the range of float16.
"""

import torch
from torch import Tensor

from grand_fast.solvers.combination import check_field
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.term import AbstractTerm
from grand_fast.solvers.tolerances import wide

_MOST_ROUNDED = 0.25  # of a state: 32 steps of bfloat16, 256 of float16


def is_widened(solver: AbstractSolver, dtype: torch.dtype, steps: float) -> bool:
    """Whether the method holds slopes, of many steps or for an estimate of its error.

    Others add up in the state's own type, in the term's fused step, unless the steps are so many.
    """
    return solver.holds_slopes or (not solver.wants_matrix and are_too_many(steps, dtype))


def are_too_many(steps: float, dtype: torch.dtype) -> bool:
    """Whether so many roundings of a state come near to the state itself."""
    return steps * torch.finfo(dtype).eps > _MOST_ROUNDED


class WideTerm(AbstractTerm):
    """A term of states of `dtype` as one of wider states."""

    def __init__(self, term: AbstractTerm, dtype: torch.dtype) -> None:
        self.term, self.dtype = term, dtype

    @classmethod
    def of(cls, term: AbstractTerm, x: Tensor) -> tuple[AbstractTerm, Tensor]:
        """The term and the state `x`, widened where that is needed."""
        dtype = wide(x.dtype)
        return (term, x) if dtype == x.dtype else (cls(term, x.dtype), x.to(dtype))

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f(t, x)` of the state in the term's type, widened."""
        y = x.to(self.dtype)
        return check_field(self.term.vf(t, y), y).to(x.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that the inner term depends on, in their own types."""
        return self.term.tensors()

    def split_constant(self) -> tuple[AbstractTerm, Tensor | None]:
        """The inner term without its constant, and that constant widened."""
        term, constant = self.term.split_constant()
        if constant is not None:
            constant = constant.to(wide(self.dtype))
        return WideTerm(term, self.dtype), constant
