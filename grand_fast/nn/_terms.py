"""The vector fields of GRAND as terms for the solvers."""

from collections.abc import Callable

from torch import Tensor

from grand_fast import ops
from grand_fast.graph import Graph
from grand_fast.solvers import AbstractTerm


class NonlinearDiffusion(AbstractTerm):
    """`f = alpha (A(x) x − x) + beta x0`, the attention recomputed from each state (GRAND-nl)."""

    def __init__(
        self,
        field: Callable[[Tensor, Graph, Tensor | None], Tensor],
        graph: Graph,
        x0: Tensor | None,
    ) -> None:
        self.field, self.graph, self.x0 = field, graph, x0

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f`, shaped like `x`."""
        return self.field(x, self.graph, self.x0)


class LinearDiffusion(AbstractTerm):
    """`f = alpha (A x − x) + beta x0` with constant weights `a [E]` (GRAND-l, Laplacian)."""

    def __init__(
        self,
        a: Tensor,
        graph: Graph,
        *,
        alpha: Tensor | float,
        beta: Tensor | None,
        x0: Tensor | None,
    ) -> None:
        self.a, self.graph, self.alpha, self.beta, self.x0 = a, graph, alpha, beta, x0

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f`, shaped like `x`."""
        return ops.csr_diffusion(
            x,
            self.a,
            self.graph,
            alpha=self.alpha,
            beta=self.beta,
            x0=self.x0,
            edge_order="csr",
        )
