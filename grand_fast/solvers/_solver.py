"""One step of a method over `[t, t + tau]`."""

from abc import ABC, abstractmethod

from torch import Tensor

from grand_fast.solvers._term import AbstractTerm


class AbstractSolver(ABC):
    """A one-step method; it knows neither the grid nor how the solve is differentiated."""

    order: int

    @abstractmethod
    def step(self, term: AbstractTerm, t: float, x: Tensor, tau: float) -> Tensor:
        """The state at `t + tau` from the state `x` at `t`."""
