"""The vector fields of GRAND as terms for the solvers: each update is one fused operator."""

from copy import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grand_fast import ops
from grand_fast.graph import Graph
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.ops.calls import Planned
from grand_fast.ops.csr_diffusion import planned
from grand_fast.ops.edge_attention import EdgeOrder, to_slots
from grand_fast.solvers import AbstractLinearTerm, AbstractTerm, Add, Combination, Scale
from grand_fast.solvers.term import AbstractFusedTerm


class NonlinearDiffusion(AbstractFusedTerm):
    """`f = alpha (A(x) x − x) + beta x0`, the attention recomputed from each state (GRAND-nl).

    `beta x0` is computed once: its gradient by each evaluation is that by `f`, which takes no pass.
    """

    def __init__(self, field: AttentionDiffusion, graph: Graph, x0: Tensor | None) -> None:
        self.field, self.graph = field, graph
        self.buffers = Buffers(field)
        self.source: Tensor | Literal[False] | None = field.scale.source(x0)
        self._planned: Planned | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """The layer's parameters, the source and, where they multiply the scores, edge weights."""
        weight = self.graph.edge_weight if self.field.reweight else None
        further = [t for t in (self.source, weight) if isinstance(t, Tensor)]
        return (*self.field.parameters(), *further)

    def planned(self, x: Tensor) -> AbstractTerm:
        """The same by one operator that looks up nothing again, where the field is one."""
        if not isinstance(self.field, AttentionDiffusion):  # something around one
            return self
        term = copy(self)
        term._planned = self.field.planned(x, self.graph)
        term.returns_new = term._planned is not None
        return term

    def split_constant(self) -> tuple[AbstractTerm, Tensor | None]:
        """The field without its source, and the source."""
        if not isinstance(self.source, Tensor):
            return self, None
        term = copy(self)
        term.source = False
        return term, self.source

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`."""
        if self._planned is not None:
            add, source = base.terms, self.source
            if isinstance(source, Tensor):
                add = [*add, (tau, source)]
            y = self._planned(x, scale=tau, add=add)
            if y is not None:
                return y
        with self.buffers:
            y = self.field(x, self.graph, scale=tau, add=base.terms, source=self.source)
        return y  # type: ignore[no-any-return]

    def freeze(self, t: float, x: Tensor) -> "LinearDiffusion":
        """The linear diffusion with the attention at the state `x`, `E` values."""
        if self.field.mix_features:
            raise TypeError(
                "integrate: `term` must have one matrix for all channels to be held constant, got "
                "mix_features=True. Use an explicit method such as rk4."
            )
        with self.buffers:
            a = self.field.attention(x, self.graph, mean_heads=True, edge_order="csr")
        source = self.source if isinstance(self.source, Tensor) else None
        beta = None if source is None else 1.0
        alpha = self.field.scale.alpha
        return LinearDiffusion(a, self.graph, alpha=alpha, beta=beta, x0=source)


class LinearDiffusion(AbstractFusedTerm, AbstractLinearTerm):
    """`f = alpha (A x − x) + beta x0` with constant weights `a [E]` (GRAND-l, Laplacian)."""

    def __init__(
        self,
        a: Tensor,
        graph: Graph,
        *,
        alpha: Scale = 1.0,
        beta: Scale | None = None,
        x0: Tensor | None = None,
        edge_order: EdgeOrder = "csr",
    ) -> None:
        self.a, self.graph, self.alpha, self.beta, self.source = a, graph, alpha, beta, x0
        self.edge_order, self.matrix = edge_order, partial(_product, graph, edge_order)
        self._planned: Planned | None = None

    def freeze(self, t: float, x: Tensor) -> AbstractLinearTerm:
        """Itself, its weights in CSR order."""
        return self._in_slots()

    def linear(self) -> AbstractLinearTerm:
        """Itself, its weights in CSR order."""
        return self._in_slots()

    def _in_slots(self) -> "LinearDiffusion":
        if self.edge_order == "csr":
            return self
        a = to_slots(self.a, self.graph)
        return LinearDiffusion(a, self.graph, alpha=self.alpha, beta=self.beta, x0=self.source)

    def planned(self, x: Tensor) -> AbstractTerm:
        """The same by an operator that looks up nothing again; its source goes into the sum."""
        if self.source is not None and not isinstance(self.beta, int | float):
            return self
        term = copy(self._in_slots())
        term._planned = planned(x, term.a, self.graph, alpha=self.alpha)
        term.returns_new = True
        return term

    def tensors(self) -> tuple[Tensor, ...]:
        """The weights `[E]`, and what of alpha, beta and the source is a tensor."""
        given = (self.a, self.alpha, self.beta, self.source)
        return tuple(t for t in given if isinstance(t, Tensor))

    def split_constant(self) -> tuple[AbstractTerm, Tensor | None]:
        """The diffusion without its source, and that."""
        if self.source is None or self.beta is None:
            return self, None
        is_whole = isinstance(self.beta, int | float) and self.beta == 1.0
        constant = self.source if is_whole else self.beta * self.source
        term = copy(self)
        term.beta = term.source = None
        return term, constant

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`."""
        add, beta, source = base.terms, self.beta, self.source
        if source is not None and isinstance(beta, int | float):
            add, beta, source = [*add, (tau * beta, source)], None, None
        y = None if self._planned is None else self._planned(x, scale=tau, add=add)
        if y is not None:
            return y
        return ops.csr_diffusion(
            x, self.a, self.graph, alpha=tau * self.alpha,
            beta=None if beta is None else tau * beta, x0=source, add=add,
            edge_order=self.edge_order,
        )  # fmt: skip


def _product(
    graph: Graph, edge_order: EdgeOrder, a: Tensor, y: Tensor, scale: Scale, add: Add
) -> Tensor:
    """`scale · A y + Σ c z`.

    The operator takes y from A y; it is added again, as a source where the scale is a tensor.
    """
    if isinstance(scale, Tensor):
        return ops.csr_diffusion(
            y, a, graph, alpha=scale, beta=scale, x0=y, add=add, edge_order=edge_order
        )
    add = [(scale, y), *add]
    return ops.csr_diffusion(y, a, graph, alpha=scale, add=add, edge_order=edge_order)


class LinearMixing(AbstractFusedTerm):
    """`f = alpha (W_out mean_h A^h V^h − x) + beta x0` with constant weights `a [E, H]`."""

    def __init__(
        self, field: AttentionDiffusion, a: Tensor, graph: Graph, x0: Tensor | None
    ) -> None:
        self.field, self.graph, self.x0 = field, graph, x0
        self.buffers = Buffers(field)
        self.a = [a_h.contiguous() for a_h in a.unbind(1)]

    def tensors(self) -> tuple[Tensor, ...]:
        """Weights, the layer's parameters, and the source."""
        return (*self.a, *self.field.parameters(), *([] if self.x0 is None else [self.x0]))

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`."""
        share = 1 / len(self.a)
        before: list[tuple[float, Tensor]] = []
        with self.buffers:
            for v, a in zip(self.field.values(x), self.a, strict=True):
                # (A v − v + v) / H on top of the heads before
                add = [(share, v), *before]
                mixed = ops.csr_diffusion(v, a, self.graph, alpha=share, add=add, edge_order="csr")
                before = [(1.0, mixed)]
            return self.field.field_of(mixed, x, self.x0, scale=tau, add=base.terms)


class Buffers:
    """The buffers of a module in training, as they are when a solve begins.

    The vectors of a spectral norm, for one, are others after each call. Every evaluation but the
    first, also those that run again in backward, finds them as the first did, and leaves them as it
    did: `with buffers: …`. The solve is then of one function, and changes them once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._start: list[tuple[dict[str, Any], str, Tensor]] = []
        self._left: list[tuple[dict[str, Any], str, Tensor]] = []
        self._is_first = True
        if torch.compiler.is_compiling():
            return
        for owner in module.modules():
            if owner._buffers and owner.training:
                known = owner._buffers.items()
                self._start += [(owner._buffers, n, b.clone()) for n, b in known if b is not None]

    def __enter__(self) -> None:
        if not self._start:
            return
        if self._is_first:
            self._is_first = False
            return
        for buffers, name, start in self._start:
            self._left.append((buffers, name, buffers[name]))
            buffers[name] = start.clone()

    def __exit__(self, *_: object) -> None:
        while self._left:
            buffers, name, left = self._left.pop()
            buffers[name] = left
