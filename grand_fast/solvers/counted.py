"""`CountedTerm`: what a solve makes of the term it is given."""

from functools import partial

import torch
from torch import Tensor

from grand_fast.solvers.combination import Add, Combination, Matrix, Scale, check_field
from grand_fast.solvers.owned import owned
from grand_fast.solvers.term import AbstractLinearTerm, AbstractTerm, Counter


class CountedTerm(AbstractTerm):
    """A term that counts its evaluations in `nfe`; a product with its matrix is one.

    What it returns stays as it is while the term is evaluated again.

    Args:
        term: what is counted.
        limit: of evaluations, after which the solve gives up.
    """

    def __init__(self, term: AbstractTerm, limit: int | None = None) -> None:
        self.term, self.limit = term, limit
        self.counter = Counter()

    @property
    def nfe(self) -> int:
        """Evaluations so far, those in backward too."""
        return self.counter.nfe

    @property
    def is_spent(self) -> bool:
        """Whether there have been as many as there may be."""
        return self.limit is not None and self.nfe >= self.limit

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that the inner term depends on."""
        return self.term.tensors()

    def split_constant(self) -> tuple[AbstractTerm, Tensor | None]:
        """Those of the term; g counts here."""
        term, constant = self.term.split_constant()
        counted = CountedTerm(term)
        counted.counter = self.counter
        return counted, constant

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f(t, x)`, counted."""
        self.counter.nfe += 1
        if self.term.returns_new:
            return self.term.vf(t, x)
        return owned(check_field(self.term.vf(t, x), x))

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f(t, x)`, counted once."""
        self.counter.nfe += 1
        if self.term.returns_new:
            return self.term.axpy(t, x, base, tau)
        return _owned_update(self.term, t, x, base, tau)

    def freeze(self, t: float, x: Tensor) -> AbstractLinearTerm:
        """The frozen term, whose products count here."""
        return _CountedLinearTerm(self.term.freeze(t, x), self.counter)

    def linear(self) -> AbstractLinearTerm:
        """The linear term, whose products count here."""
        return _CountedLinearTerm(self.term.linear(), self.counter)


class _CountedLinearTerm(AbstractLinearTerm):
    def __init__(self, term: AbstractLinearTerm, counter: Counter) -> None:
        self.a, self.alpha, self.beta, self.source = term.a, term.alpha, term.beta, term.source
        self.matrix = partial(_counted_product, counter, term.matrix)
        self._term, self._counter = term, counter

    def vf(self, t: float, x: Tensor) -> Tensor:
        self._counter.nfe += 1
        return owned(self._term.vf(t, x))

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        self._counter.nfe += 1
        return _owned_update(self._term, t, x, base, tau)


def _counted_product(
    counter: Counter, matrix: Matrix, a: Tensor, y: Tensor, scale: Scale, add: Add
) -> Tensor:
    counter.nfe += 1
    return owned(matrix(a, y, scale, add))


def _owned_update(term: AbstractTerm, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
    if type(term).axpy is AbstractTerm.axpy or torch.compiler.is_compiling():
        return term.axpy(t, x, base, tau)  # a sum that was made anew
    return owned(term.axpy(t, x, base, tau))
