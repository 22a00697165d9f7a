"""`AbstractDiffusion`: what modules that diffuse a state share: the term and its solve."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grand_fast.graph import Graph
from grand_fast.nn._layers import DiffusionScale
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.nn.terms import LinearDiffusion, LinearMixing, NonlinearDiffusion
from grand_fast.ops.backends import transforms_active, unwrapped
from grand_fast.solvers import (
    AbstractTerm,
    Adjoint,
    ContinuousOptions,
    Method,
    Solution,
    Stats,
    Status,
    integrate,
)
from grand_fast.solvers.checks import check_number
from grand_fast.solvers.regularizers import Regularizer
from grand_fast.solvers.solution import Outcome
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.tolerances import Convention

Observe = Callable[[float, Tensor], None]  # of t and the state


def _plain(outcome: Outcome) -> Outcome:
    """Without what ends with a transform of torch.func."""
    if not transforms_active():
        return outcome
    return replace(outcome, _checksum=unwrapped(outcome._checksum).sum())


class AbstractDiffusion(nn.Module):
    """A vector field on a graph and how it is integrated to `T`; subclasses set these attributes.

    variant, laplacian: which term, of `GRAND`'s.
    gamma: of variant `"mixed"`: its sigmoid is the share of the Laplacian.
    The others are as in `integrate`; `adjoint_method` and `tol_scale_adjoint` of `"continuous"`.
    """

    variant: str
    laplacian: str
    field: AttentionDiffusion | DiffusionScale
    gamma: nn.Parameter | None
    T: float
    method: Method | AbstractSolver
    step_size: float | None
    rtol: float | None
    atol: float | None
    tol_scale: float | None
    tol_convention: Convention
    adjoint: Adjoint
    tol_scale_adjoint: float | None
    adjoint_method: Method | AbstractSolver | None
    memory_limit: int | None
    max_nfe: int | None
    regularizers: Sequence[Regularizer]

    def __init__(self) -> None:
        super().__init__()
        self.penalties: dict[str, Tensor] = {}
        self._outcome: Outcome | None = None  # of the last solve

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a file of the module: penalties belong to a graph of autograd, which has none
        return self.__dict__ | {"penalties": {}}

    def _diffuse(self, x: Tensor, graph: Graph) -> Tensor:
        """The state at `T` from `x [N, d]` at 0."""
        solution = self._solve(
            self._term(x, graph), x, self.T, regularizers=self.regularizers if self.training else ()
        )
        if not torch.compiler.is_exporting():  # a program keeps nothing between calls
            self._outcome, self.penalties = _plain(solution.outcome), solution.penalties
        return solution.x

    def _observe(self, x: Tensor, graph: Graph, T: float, observe: Observe) -> None:
        """The states from 0 to `T`, without gradients.

        Past `self.T` a second solve goes on, so that the steps up to there are those of `_diffuse`.
        """
        check_number("T", T, positive=False)
        term, rest = self._term(x, graph), T - self.T
        solution = self._solve(term, x, min(T, self.T), observe=observe)
        self._outcome, self.penalties = solution.outcome, {}
        if rest <= 0 or solution.t < self.T:
            return

        def further(t: float, x: Tensor) -> None:
            if t > 0:
                observe(T if t == rest else self.T + t, x)

        self._solve(term, solution.x, rest, observe=further)

    def _solve(
        self,
        term: AbstractTerm,
        x: Tensor,
        T: float,
        *,
        regularizers: Sequence[Regularizer] = (),
        observe: Observe | None = None,
    ) -> Solution:
        return integrate(
            term,
            x,
            T,
            method=self.method,
            step_size=self.step_size,
            rtol=self.rtol,
            atol=self.atol,
            tol_scale=self.tol_scale,
            tol_convention=self.tol_convention,
            adjoint=self.adjoint,
            adjoint_options=ContinuousOptions(
                method=self.adjoint_method,
                tol_scale=self.tol_scale_adjoint,
                tol_convention=self.tol_convention,
            ),
            memory_limit=self.memory_limit,
            max_nfe=self.max_nfe,
            regularizers=regularizers,
            observe=observe,
        )

    def _term(self, x0: Tensor, graph: Graph) -> AbstractTerm:
        field = self.field
        if isinstance(field, DiffusionScale):
            return self._linear(self._laplacian_weights(graph, x0.dtype), field, x0, graph)
        source = None if field.scale.beta is None else x0
        if self.variant in ("nl", "nl-rw"):
            return NonlinearDiffusion(field, graph, source)
        if field.mix_features:
            a = field.attention(x0, graph, edge_order="csr")
            return LinearMixing(field, a, graph, source)
        a = field.attention(x0, graph, mean_heads=True, edge_order="csr")
        if self.gamma is not None:
            share = torch.sigmoid(self.gamma).to(a.dtype)
            a = torch.lerp(a, self._laplacian_weights(graph, a.dtype), share)
        return self._linear(a, field.scale, x0, graph)

    def _linear(
        self, a: Tensor, scale: DiffusionScale, x0: Tensor, graph: Graph
    ) -> LinearDiffusion:
        source = scale.source(x0)
        beta = None if source is None else 1.0
        return LinearDiffusion(a, graph, alpha=scale.alpha, beta=beta, x0=source)

    def _laplacian_weights(self, graph: Graph, dtype: torch.dtype) -> Tensor:
        if self.laplacian == "symmetric":
            return graph.symmetric_weights(dtype, edge_order="csr")
        return graph.random_walk_weights(dtype, edge_order="csr")

    @property
    def stats(self) -> Stats | None:
        """Work of the last solve; None before the first."""
        return None if self._outcome is None else self._outcome.stats

    @property
    def status(self) -> Status | None:
        """How the last solve ended (reads one value from the device); None before the first."""
        return None if self._outcome is None else self._outcome.status

    @property
    def t(self) -> float | None:
        """Time that the last solve reached: `T`, or where it failed; None before the first."""
        return None if self._outcome is None else self._outcome.t

    @property
    def failure(self) -> str | None:
        """Status, time reached and what to try if the last solve failed; else None."""
        return None if self._outcome is None else self._outcome.failure

    @property
    def nfe_backward(self) -> int | None:
        """Evaluations of f in the backward pass of the last solve; None before the first."""
        return None if self._outcome is None else self._outcome.nfe_backward

    def extra_repr(self) -> str:
        """The solve, for `print(model)`."""
        return (
            f"variant={self.variant}, T={self.T}, method={self.method}, "
            f"step_size={self.step_size}, adjoint={self.adjoint}"
        )
