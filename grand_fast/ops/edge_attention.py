"""`edge_attention`: the attention weights, written out once per edge."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from grand_fast.graph import Graph
from grand_fast.ops._checks import (
    check_choice,
    check_graph,
    check_tensor,
    inner_contiguous,
    message,
)
from grand_fast.ops._dispatch import Backend, choose, launchers, plan
from grand_fast.ops._edge_order import EDGE_ORDERS, EdgeOrder, to_user

_OP = "edge_attention"
_PLANNED_SCORES = ("cosine", "pearson", "exp_kernel", "gat")


def edge_attention(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    graph: Graph,
    *,
    score: str = "scaled_dot",
    normalizer: str = "softmax",
    normalize: str = "receiver",
    edge_weight: Float[Tensor, " E"] | None = None,
    mean_heads: bool = False,
    edge_order: EdgeOrder = "user",
    backend: Backend = "auto",
) -> Float[Tensor, "E H"] | Float[Tensor, " E"]:
    """The attention weights of every edge, for GRAND-l, rewiring and inspection.

    `a^h_ij = softmax_j(<q^h_i, k^h_j> / √d_k)` over the senders `j` of receiver `i`

    Args:
        q, k: queries of receivers and keys of senders, `[N, H, d_k]`.
        graph: the edges.
        score: `"scaled_dot"`.
        normalizer: `"softmax"`.
        normalize: `"receiver"`: the weights of a receiver sum to 1.
        edge_weight: not supported yet.
        mean_heads: return the mean over heads, `[E]`; the weights of single heads are not stored.
        edge_order: order of the result: `"user"`, that of the edge index given to `Graph`
            (appended loops last), or `"csr"`, that of `graph.col`, which saves a permutation.
        backend: `"auto"` goes by the device of `q`.

    Returns:
        `a` `[E, H]`, or `[E]` with `mean_heads`, in the dtype of `q`.

    Differentiable by `q` and `k`. Saves its inputs and `lse [N, H]`.
    Reference: GRAND (Chamberlain et al. 2021), equation 10.
    """
    check_graph(_OP, graph)
    check_query_key(_OP, q, k, graph, like=None)
    check_attention(_OP, score, normalizer, normalize, edge_weight)
    check_choice(_OP, "edge_order", edge_order, known=EDGE_ORDERS)
    name = choose(_OP, backend, q)
    if name == "reference":
        a, _ = launchers(_OP, name).edge_attention_fwd(q, k, mean_heads=mean_heads, csr=graph.csr())
    else:
        a = _EdgeAttentionFunction.apply(q, k, mean_heads, graph, name)
    return to_user(a, graph) if edge_order == "user" else a


def check_query_key(op: str, q: Any, k: Any, graph: Graph, *, like: Tensor | None) -> None:
    """`q` and `k` are `[N, H, d_k]` alike."""
    letters = "[N, H, d_k]"
    sizes = (graph.num_nodes, None, None)
    remedy = "Split its heads with .view(N, H, d_k)." if getattr(q, "ndim", 3) == 2 else ""
    check_tensor(op, "q", q, letters=letters, sizes=sizes, like=like, graph=graph, remedy=remedy)
    check_tensor(op, "k", k, letters=letters, sizes=tuple(q.shape), like=q)


def check_attention(op: str, score: Any, normalizer: Any, normalize: Any, edge_weight: Any) -> None:
    """The choices that this version supports."""
    check_choice(op, "score", score, known=("scaled_dot",), planned=_PLANNED_SCORES)
    check_choice(op, "normalizer", normalizer, known=("softmax",), planned=("squareplus",))
    check_choice(op, "normalize", normalize, known=("receiver",), planned=("sender",))
    if edge_weight is not None:
        got = type(edge_weight).__name__
        raise NotImplementedError(message(op, "edge_weight", "must be None in this version", got))


class _EdgeAttentionFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, mean_heads: bool, graph: Graph, name: str
    ) -> Tensor:
        q, k = inner_contiguous(q), inner_contiguous(k)
        a, lse = launchers(_OP, name).edge_attention_fwd(
            q, k, mean_heads=mean_heads, csr=graph.csr(plan(name))
        )
        ctx.save_for_backward(q, k, lse)
        ctx.mean_heads, ctx.graph, ctx.name = mean_heads, graph, name
        return a  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse = ctx.saved_tensors
        dq, dk = launchers(_OP, ctx.name).edge_attention_bwd(
            da.contiguous(),
            q,
            k,
            lse=lse,
            csr=ctx.graph.csr(plan(ctx.name)),
            csr_t=ctx.graph.csr(plan(ctx.name), transposed=True),
        )
        return dq, dk, None, None, None
