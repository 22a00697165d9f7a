"""The vector fields of GRAND as terms for the solvers: each update is one fused operator."""

from torch import Tensor

from grand_fast import ops
from grand_fast.graph import Graph
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.solvers import AbstractTerm, Combination


class NonlinearDiffusion(AbstractTerm):
    """`f = alpha (A(x) x − x) + beta x0`, the attention recomputed from each state (GRAND-nl)."""

    def __init__(self, field: AttentionDiffusion, graph: Graph, x0: Tensor | None) -> None:
        self.field, self.graph, self.x0 = field, graph, x0

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f`, shaped like `x`."""
        f: Tensor = self.field(x, self.graph, self.x0)
        return f

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`."""
        y: Tensor = self.field(x, self.graph, self.x0, scale=tau, add=base.terms)
        return y


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
        return self.axpy(t, x, Combination([]), 1.0)

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`."""
        return ops.csr_diffusion(
            x,
            self.a,
            self.graph,
            alpha=tau * self.alpha,
            beta=None if self.beta is None else tau * self.beta,
            x0=self.x0,
            add=base.terms,
            edge_order="csr",
        )


class LinearMixing(AbstractTerm):
    """`f = alpha (W_out mean_h A^h V^h − x) + beta x0` with constant weights `a [E, H]`."""

    def __init__(
        self, field: AttentionDiffusion, a: Tensor, graph: Graph, x0: Tensor | None
    ) -> None:
        self.field, self.graph, self.x0 = field, graph, x0
        self.a = [a_h.contiguous() for a_h in a.unbind(1)]

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f`, shaped like `x`."""
        return self.axpy(t, x, Combination([]), 1.0)

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`."""
        share = 1 / len(self.a)
        before: list[tuple[float, Tensor]] = []
        for v, a in zip(self.field.values(x), self.a, strict=True):
            # (A v − v + v) / H on top of the heads before
            add = [(share, v), *before]
            mixed = ops.csr_diffusion(v, a, self.graph, alpha=share, add=add, edge_order="csr")
            before = [(1.0, mixed)]
        return self.field.field_of(mixed, x, self.x0, scale=tau, add=base.terms)
