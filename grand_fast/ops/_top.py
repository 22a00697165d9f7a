"""The largest score of all edges and heads, which squareplus counts from, and its gradient."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from grand_fast.graph import Graph
from grand_fast.kernels._weighting import Weighting
from grand_fast.kernels.edge_attention.reference import edge_scores
from grand_fast.ops._checks import inner_contiguous
from grand_fast.ops._dispatch import launchers, plan

_CHUNK = 1 << 20  # edges whose scores are computed at a time, should that many be equally large


def score_top(
    q: Tensor,
    k: Tensor,
    edge_weight: Tensor | None,
    *,
    weighting: Weighting,
    graph: Graph,
    name: str,
) -> Tensor:
    """max s over edges and heads, a scalar in float32 or wider; 0 in a graph without edges.

    Differentiable by `q`, `k` and `edge_weight` (slot order): the gradient goes to the edge and
    head that have it, in equal parts to several, as that of `Tensor.max`.
    """
    top: Tensor = _ScoreTopFunction.apply(q, k, edge_weight, weighting, graph, name)
    return top


class _ScoreTopFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        edge_weight: Tensor | None,
        weighting: Weighting,
        graph: Graph,
        name: str,
    ) -> Tensor:
        if graph.num_edges == 0:
            top_of_row = q.new_zeros((0, q.shape[1]), dtype=torch.float32)
            top = torch.zeros(
                (), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
            )
        else:
            top_of_row = launchers("edge_attention", name).edge_attention_top(
                inner_contiguous(q),
                inner_contiguous(k),
                weighting=weighting,
                edge_weight=edge_weight,
                csr=graph.csr(plan(name)),
            )
            top = top_of_row.max()
        ctx.save_for_backward(q, k, edge_weight, top_of_row)
        ctx.weighting, ctx.graph = weighting, graph
        return top

    @staticmethod
    def backward(ctx: Any, dtop: Tensor) -> tuple[Tensor | None, ...]:
        q, k, edge_weight, top_of_row = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        inputs = [t for t in (q, k, edge_weight) if t is not None]
        if not twice:
            inputs = [t.detach().requires_grad_() for t in inputs]
        given = (*inputs, None)[:3]
        grads: list[Tensor | None] = [None] * len(inputs)
        if ctx.graph.num_edges:
            ties = list(_ties(ctx.graph, given, ctx.weighting, top_of_row))
            largest = max(float(s) for s, _, _ in ties)
            ties = [tie for tie in ties if float(tie[0]) == largest]
            count = sum(head.numel() for _, _, head in ties)
            for _, slots, head in ties:
                with torch.enable_grad():
                    s = _scores(ctx.graph, given, ctx.weighting, slots)
                    share = s.gather(1, head[:, None]).sum() * (dtop / count)
                    of_chunk = torch.autograd.grad(
                        share, inputs, create_graph=twice, allow_unused=True
                    )
                grads = [b if a is None else a + b for a, b in zip(grads, of_chunk, strict=True)]
        return (*grads, None, None)[:3] + (None, None, None)


def _scores(graph: Graph, given: Any, weighting: Weighting, slots: Tensor) -> Tensor:
    """Scores of some slots, `[len(slots), H]`."""
    q, k, edge_weight = given
    receiver = torch.searchsorted(graph.rowptr, slots.to(graph.rowptr.dtype), right=True) - 1
    return edge_scores(
        q,
        k,
        weighting=weighting,
        edge_weight=None if edge_weight is None else edge_weight[slots],
        receiver=receiver,
        sender=graph.col[slots].long(),
    )


def _ties(
    graph: Graph, given: Any, weighting: Weighting, top_of_row: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per chunk of the rows that reach the largest score: it, and the slots and heads that have it.

    The scores are computed again, in another order than a kernel's: those of the chunk are compared
    with one another, where equal vectors give equal scores.
    """
    rows = (top_of_row == top_of_row.max()).any(1).nonzero().flatten()
    degree = graph.rowptr.diff()[rows].long()
    ends = degree.cumsum(0)
    for begin in range(0, int(ends[-1]), _CHUNK):
        position = torch.arange(begin, min(begin + _CHUNK, int(ends[-1])), device=graph.device)
        row = torch.searchsorted(ends, position, right=True)
        slots = graph.rowptr[rows[row]].long() + position - (ends - degree)[row]
        with torch.no_grad():
            s = _scores(graph, given, weighting, slots)
        largest = s.max()
        edge, head = (s == largest).nonzero().unbind(1)
        yield largest, slots[edge], head
