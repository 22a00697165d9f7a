"""`AbstractDiffusion`: what modules that diffuse a state share: the term and its solve."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grand_fast.graph import Graph
from grand_fast.nn._layers import DiffusionScale
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.nn.terms import LinearDiffusion, LinearMixing, NonlinearDiffusion
from grand_fast.ops.backends import transforms_active, unwrapped
from grand_fast.solvers import AbstractTerm, Solve, Stats, Status, integrate
from grand_fast.solvers.checks import check_number
from grand_fast.solvers.options import shows
from grand_fast.solvers.solution import Outcome

Observe = Callable[[float, Tensor], None]  # of t and the state


def _plain(outcome: Outcome) -> Outcome:
    """Without what ends with a transform of torch.func."""
    if not transforms_active():
        return outcome
    return replace(outcome, _checksum=unwrapped(outcome._checksum).sum())


def _of_last_solve(name: str, text: str) -> Any:
    return property(lambda module: getattr(module._outcome, name, None), doc=text)


@shows(Solve, "solve")
class AbstractDiffusion(nn.Module):
    """A vector field on a graph and how it is integrated to `T`; subclasses set these attributes.

    variant, laplacian: which term, of `GRAND`'s.
    gamma: of variant `"mixed"`: its sigmoid is the share of the Laplacian.
    solve: how; its fields may be read and set as attributes of the module.
    """

    variant: str
    laplacian: str
    field: AttentionDiffusion | DiffusionScale
    gamma: nn.Parameter | None
    solve: Solve

    # Of the last solve; None before the first. `status` and `failure` read a value from the device.
    stats: Stats | None = _of_last_solve("stats", "Work: steps and evaluations of f.")
    status: Status | None = _of_last_solve("status", "How it ended, a `Status`.")
    t: float | None = _of_last_solve("t", "Time that it reached: `T`, or where it failed.")
    failure: str | None = _of_last_solve("failure", "Why it failed, when, and what to try.")
    nfe_backward: int | None = _of_last_solve("nfe_backward", "Evaluations of f in backward.")

    def __init__(self) -> None:
        super().__init__()
        self.penalties: dict[str, Tensor] = {}
        self._outcome: Outcome | None = None  # of the last solve

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a file of the module: penalties belong to a graph of autograd, which has none
        return self.__dict__ | {"penalties": {}}

    def _diffuse(self, x: Tensor, graph: Graph) -> Tensor:
        """The state at `T` from `x [N, d]` at 0."""
        solve = self.solve
        if solve.regularizers and not self.training:
            solve = replace(solve, regularizers=())
        solution = integrate(self._term(x, graph), x, solve=solve)
        if not torch.compiler.is_exporting():  # a program keeps nothing between calls
            self._outcome, self.penalties = _plain(solution.outcome), solution.penalties
        return solution.x

    def _observe(self, x: Tensor, graph: Graph, T: float, observe: Observe) -> None:
        """The states from 0 to `T`, without gradients.

        Past `self.T` a second solve goes on, so that the steps up to there are those of `_diffuse`.
        """
        check_number("T", T, positive=False)
        solve = replace(self.solve, regularizers=())
        term, end = self._term(x, graph), solve.T
        solution = integrate(term, x, min(T, end), solve=solve, observe=observe)
        self._outcome, self.penalties = solution.outcome, {}
        rest = T - end
        if rest <= 0 or solution.t < end:
            return

        def further(t: float, x: Tensor) -> None:
            if t > 0:
                observe(T if t == rest else end + t, x)

        integrate(term, solution.x, rest, solve=solve, observe=further)

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

    def extra_repr(self) -> str:
        """The solve, for `print(model)`."""
        return (
            f"variant={self.variant}, T={self.solve.T}, method={self.solve.method}, "
            f"step_size={self.solve.step_size}, adjoint={self.solve.adjoint}"
        )
