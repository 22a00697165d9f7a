"""`edge_attention`: the attention weights, written out once per edge."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from grand_fast.graph import Graph
from grand_fast.kernels.weighting import AttentionGradients, Weighting
from grand_fast.ops._autograd import Gradients, Operator
from grand_fast.ops._input_types import autocast_inputs, promoted_edges
from grand_fast.ops._largest_score import score_top
from grand_fast.ops.backends import Backend, choose, transforms_active
from grand_fast.ops.calls import Call
from grand_fast.ops.checks import check_choice, check_graph, check_tensor, inner_contiguous
from grand_fast.ops.scores import AbstractScore, check_attention

_OP = "edge_attention"
EdgeOrder = Literal["user", "csr"]
EDGE_ORDERS = ("user", "csr")


@autocast_inputs
@promoted_edges("edge_weight")
def edge_attention(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    graph: Graph,
    *,
    score: str | AbstractScore = "scaled_dot",
    normalizer: str = "softmax",
    normalize: str = "receiver",
    edge_weight: Float[Tensor, " E"] | None = None,
    mean_heads: bool = False,
    edge_order: EdgeOrder = "user",
    backend: Backend = "auto",
) -> Float[Tensor, "E H"] | Float[Tensor, " E"]:
    """The attention weights of every edge, for GRAND-l, rewiring and inspection.

    `a^h_ij = softmax_j(<q^h_i, k^h_j> / √d_k)` over the senders `j` of receiver `i`, by default

    Args:
        q, k: queries of receivers and keys of senders, `[N, H, d_k]`.
        graph: the edges.
        score: `"scaled_dot"`, `"cosine"`, `"pearson"`, `"exp_kernel"`, `"gat"`; or an object that
            carries its parameters, `ops.ExpKernel(…)`, `ops.GAT(…)`.
        normalizer: `"softmax"`, or `"squareplus"`: `p / Σ p` of `p = (v + √(v² + 4)) / 2`, with `v`
            the score less the largest of all edges and heads, through which gradients flow too.
        normalize: `"receiver"`: the weights of a receiver sum to 1 (the paper's); `"sender"`: those
            of a sender do.
        edge_weight: `[E]`, in the user's order: multiplies the scores. If of another float type
            than the rest, all are promoted to that of both.
        mean_heads: return the mean over heads, `[E]`; the weights of single heads are not stored.
        edge_order: order of the result: `"user"`, that of the edge index given to `Graph`
            (appended loops last), or `"csr"`, that of `graph.col`, which saves a permutation.
        backend: `"auto"` goes by the device of `q`.

    Returns:
        `a` `[E, H]`, or `[E]` with `mean_heads`, in the dtype of `q`, or of `edge_weight * q`.

    In float32 a score of size s is rounded by 6e-8 s, and its weight is off by as much: with scores
    of thousands weights no longer sum to exactly 1.

    Differentiable by `q`, `k`, `edge_weight` and the parameters of `score`. Saves its inputs and
    `norm [N, 2, H]`.
    Reference: GRAND (Chamberlain et al. 2021), equations 10 and 13.
    """
    check_graph(_OP, graph)
    check_query_key(_OP, q, k, graph, like=None)
    score_object, weighting = check_attention(_OP, score, normalizer, normalize, q.shape[2])
    check_edge_weight(_OP, edge_weight, graph, q)
    check_choice(_OP, "edge_order", edge_order, known=EDGE_ORDERS)
    name = choose(_OP, backend, q)
    dtype = q.dtype
    q, k = (inner_contiguous(t) for t in score_object.prepare(q, k))
    w, top = edge_inputs(q, k, edge_weight, weighting=weighting, graph=graph, name=name)
    call = Call(graph, name, weighting, mean_heads=mean_heads)
    a = _operator(call, q, k, w, top).to(dtype)
    return to_user(a, graph) if edge_order == "user" else a


def check_query_key(op: str, q: Any, k: Any, graph: Graph, *, like: Tensor | None) -> None:
    """`q` and `k` are `[N, H, d_k]` alike."""
    letters = "[N, H, d_k]"
    sizes = (graph.num_nodes, None, None)
    remedy = "Split its heads with .view(N, H, d_k)." if getattr(q, "ndim", 3) == 2 else ""
    check_tensor(op, "q", q, letters=letters, sizes=sizes, like=like, graph=graph, remedy=remedy)
    check_tensor(op, "k", k, letters=letters, sizes=tuple(q.shape), like=q)


def check_edge_weight(op: str, edge_weight: Any, graph: Graph, like: Tensor) -> None:
    """`edge_weight` is `[E]` or None."""
    if edge_weight is not None:
        sizes = (graph.num_edges,)
        check_tensor(op, "edge_weight", edge_weight, letters="[E]", sizes=sizes, like=like)


def edge_inputs(
    q: Tensor, k: Tensor, edge_weight: Tensor | None, *, weighting: Weighting, graph: Graph,
    name: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """What weights depend on beside q and k: `edge_weight` in slot order, and the largest score."""
    w = None if edge_weight is None else to_slots(edge_weight, graph)
    if weighting.normalizer == "softmax":
        return w, None
    return w, score_top(q, k, w, weighting=weighting, graph=graph, name=name)


def to_slots(a: Tensor, graph: Graph) -> Tensor:
    """`a [E, …]` in the user's order → slot order."""
    return _reordered(a, graph.perm, False)


def to_user(a: Tensor, graph: Graph) -> Tensor:
    """`a [E, …]` in slot order → the user's order."""
    return _reordered(a, graph.perm, True)


def _reordered(a: Tensor, perm: Tensor, scatter: bool) -> Tensor:
    if transforms_active():
        return _Reorder.forward(None, a, perm, scatter)
    return _Reorder.apply(a, perm, scatter)  # type: ignore[no-any-return]


class _Reorder(Function):
    """A permutation of the edges: its backward is its inverse, a copy and no scatter-add."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, perm: Tensor, scatter: bool) -> Tensor:
        if ctx is not None:
            ctx.perm, ctx.scatter = perm, scatter
        if not scatter:
            return a.index_select(0, perm)
        return a.new_zeros(a.shape).index_copy(0, perm.long(), a)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None, None]:
        return _reordered(da, ctx.perm, not ctx.scatter), None, None


def _forward(
    call: Call, q: Tensor, k: Tensor, edge_weight: Tensor | None, top: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    on = call.on(_OP)
    a, norm = on.kernels.edge_attention_fwd(
        q, k, weighting=call.weighting, edge_weight=edge_weight, top=top,
        mean_heads=call.mean_heads, csr=on.csr, csr_t=on.csr_t,
    )  # fmt: skip
    return a, (norm,)


def _backward(
    call: Call, da: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool
) -> Gradients:
    q, k, edge_weight, top = inputs
    on = call.on(_OP)
    grads: AttentionGradients = on.kernels.edge_attention_bwd(
        da, q, k, weighting=call.weighting, edge_weight=edge_weight, top=top, norm=saved[0],
        csr=on.csr, csr_t=on.csr_t, needs_dedge_weight=needs[2],
    )  # fmt: skip
    return grads.dq, grads.dk, grads.dedge_weight, grads.dtop


def _fake(call: Call, q: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
    edges, heads = call.graph.num_edges, q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    a = q.new_empty([edges] if call.mean_heads else [edges, heads])
    return a, q.new_empty([q.shape[0], 2, heads], dtype=wide)


_operator = Operator(
    _OP, inputs=("q", "k", "edge_weight?", "top?"), options=("weighting", "mean_heads"), saves=1,
    forward=_forward, backward=_backward, fake=_fake,
)  # fmt: skip
