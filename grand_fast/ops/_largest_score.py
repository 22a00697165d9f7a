"""The largest score of all edges and heads, which squareplus counts from, and its gradient."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.kernels.edge_attention.reference import edge_scores
from grand_fast.kernels.weighting import Weighting
from grand_fast.ops._autograd import Gradients, Operator
from grand_fast.ops.backends import launchers, plan
from grand_fast.ops.calls import Call
from grand_fast.ops.checks import inner_contiguous

_CHUNK = 1 << 20  # edges whose scores are computed at a time, should that many be equally large


def score_top(
    q: Tensor, k: Tensor, edge_weight: Tensor | None, *, weighting: Weighting, graph: Graph,
    name: str,
) -> Tensor:  # fmt: skip
    """max s over edges and heads, a scalar in float32 or wider; 0 in a graph without edges.

    Differentiable by `q`, `k` and `edge_weight` (slot order): the gradient goes to the edge and
    head that have it, in equal parts to several, as that of `Tensor.max`.
    """
    call = Call(graph, name, weighting)
    return _operator(call, inner_contiguous(q), inner_contiguous(k), edge_weight)


def find_top(
    call: Call, q: Tensor, k: Tensor, edge_weight: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The largest score, and that of each row and head, `[N, H]`."""
    if call.graph.num_edges == 0:
        top, top_of_row = _fake(call, q)
        return top.zero_(), (top_of_row.fill_(-math.inf),)
    top_of_row = launchers("edge_attention", call.backend).edge_attention_top(
        q,
        k,
        weighting=call.weighting,
        edge_weight=edge_weight,
        csr=call.graph.csr(plan(call.backend)),
    )
    return _largest(top_of_row), (top_of_row,)


def _largest(scores: Tensor) -> Tensor:
    if scores.is_cpu:  # in NumPy, as `Shares` in kernels/cpu/rows.py
        return torch.from_numpy(np.asarray(scores.numpy().max()))
    return scores.max()


def _rows_with(top_of_row: Tensor, top: Tensor) -> Tensor:
    if top_of_row.is_cpu:
        places = np.flatnonzero(top_of_row.numpy() == top.numpy())
        return torch.from_numpy(np.unique(places // top_of_row.shape[1]))
    return (top_of_row == top).any(1).nonzero().flatten()


def _backward(
    call: Call, dtop: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool
) -> Gradients:
    grads = [None if t is None else torch.zeros_like(t) for t in inputs]
    add_top_gradients(call, dtop, inputs, saved[0], grads)
    return grads


def add_top_gradients(
    call: Call, dtop: Tensor, inputs: Any, top_of_row: Tensor, grads: Gradients
) -> None:
    """Add to the gradients by `q`, `k` and `edge_weight`, in place, those through `dtop`.

    They have a few rows only, those of the edges with the largest score.
    """
    graph = call.graph
    if graph.num_edges == 0:
        return
    if call.backend == "cpu" and _add_few(call, dtop, inputs, top_of_row, grads):
        return
    ties = list(_ties(graph, inputs, call.weighting, top_of_row))
    largest = max(float(s) for s, _, _ in ties)
    ties = [tie for tie in ties if float(tie[0]) == largest]
    count = sum(head.numel() for _, _, head in ties)
    q, k, edge_weight = inputs
    dq, dk, dedge_weight = grads
    weighting = call.weighting
    assert weighting is not None
    for _, slots, head in ties:
        receiver, sender = _ends(graph, slots)
        own_q, own_k = q[receiver, head].to(dtop.dtype), k[sender, head].to(dtop.dtype)
        u = weighting.scale * (own_q * own_k).sum(1)
        phi, derivative = _function(weighting, u)
        ds = dtop / count
        du = ds * weighting.scale * derivative
        if edge_weight is not None:
            du = du * edge_weight[slots]
        _add(dq, (receiver, head), du[:, None] * own_k)
        _add(dk, (sender, head), du[:, None] * own_q)
        _add(dedge_weight, (slots,), ds * phi)


def _add_few(call: Call, dtop: Tensor, inputs: Any, top_of_row: Tensor, grads: Gradients) -> bool:
    """The same in NumPy, whose operations take less to begin; False if edges are many."""
    weighting, (rowptr, col) = (
        call.weighting,
        (t.numpy() for t in (call.graph.rowptr, call.graph.col)),
    )
    assert weighting is not None
    rows = _rows_with(top_of_row, _largest(top_of_row)).numpy()
    degree, last = rowptr[rows + 1] - rowptr[rows], rowptr[rows + 1]
    if not 0 < int(degree.sum()) <= _CHUNK:
        return rows.size == 0  # the largest is no number
    receiver = np.repeat(rows, degree)
    slots = np.arange(receiver.size) + np.repeat(last - degree.cumsum(), degree)
    q, k, edge_weight = inputs
    own_q, own_k = _array(q)[receiver], _array(k)[col[slots]]
    u = torch.from_numpy(weighting.scale * (own_q * own_k).sum(2))
    phi, derivative = (t.numpy() for t in _function(weighting, u))
    w = 1.0 if edge_weight is None else _array(edge_weight)[slots, None]
    s = phi * w
    edge, head = np.nonzero(s == s.max())
    ds = float(dtop) / edge.size
    du = (ds * weighting.scale * derivative * w)[edge, head, None]
    dq, dk, dedge_weight = grads
    if dq is not None:
        np.add.at(_array(dq), (receiver[edge], head), du * own_k[edge, head])
    if dk is not None:
        np.add.at(_array(dk), (col[slots[edge]], head), du * own_q[edge, head])
    if dedge_weight is not None:
        np.add.at(_array(dedge_weight), slots[edge], ds * phi[edge, head])
    return True


def _array(t: Tensor) -> Any:
    return t.detach().numpy()


def _function(weighting: Weighting, u: Tensor) -> tuple[Tensor, Tensor]:
    """φ(u) and φ'(u), like `u`: the score is φ of the scaled dot product."""
    if weighting.function == "exp":
        phi = torch.exp(u)
        return phi, phi
    if weighting.function == "leaky_relu":
        derivative = torch.ones_like(u).masked_fill(u <= 0, weighting.slope)
        return derivative * u, derivative
    return u, torch.ones_like(u)


def _add(grad: Tensor | None, index: tuple[Tensor, ...], values: Tensor) -> None:
    if grad is not None:
        grad.index_put_(index, values.to(grad.dtype), accumulate=True)


def reference_top(call: Call, q: Tensor, k: Tensor, edge_weight: Tensor | None) -> Tensor:
    """The largest score in differentiable operations of torch."""
    if call.graph.num_edges == 0:
        return _fake(call, q)[0].zero_()
    slots = torch.arange(call.graph.num_edges, device=q.device)
    return _scores(call.graph, (q, k, edge_weight), call.weighting, slots).amax()


def _fake(call: Call, q: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((), dtype=wide), q.new_empty(q.shape[:2], dtype=wide)


_operator = Operator(
    "score_top", inputs=("q", "k", "edge_weight?"), options=("weighting",), saves=1,
    forward=find_top, backward=_backward, reference=reference_top, fake=_fake,
)  # fmt: skip


def _scores(graph: Graph, given: Any, weighting: Any, slots: Tensor) -> Tensor:
    """Scores of some slots, `[len(slots), H]`."""
    q, k, edge_weight = given
    receiver, sender = _ends(graph, slots)
    return edge_scores(
        q, k, weighting=weighting, edge_weight=None if edge_weight is None else edge_weight[slots],
        receiver=receiver, sender=sender,
    )  # fmt: skip


def _ends(graph: Graph, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Receivers and senders of some slots."""
    receiver = torch.searchsorted(graph.rowptr, slots.to(graph.rowptr.dtype), right=True) - 1
    return receiver, graph.col[slots].long()


def _ties(
    graph: Graph, given: Any, weighting: Any, top_of_row: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per chunk of the rows that reach the largest score: it, and the slots and heads that have it.

    The scores are computed again, in another order than a kernel's: those of the chunk are compared
    with one another, where equal vectors give equal scores.
    """
    rows = _rows_with(top_of_row, _largest(top_of_row))
    degree = (graph.rowptr[rows + 1] - graph.rowptr[rows]).long()
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
