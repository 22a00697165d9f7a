"""`attention_product`: the attention's weighted sums of values that each head has for itself."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.kernels.weighting import ProductGradients
from grand_fast.ops._autograd import Gradients, Operator
from grand_fast.ops._input_types import autocast_inputs, promoted_edges
from grand_fast.ops.backends import Backend, choose
from grand_fast.ops.calls import Call
from grand_fast.ops.checks import (
    check_choice,
    check_graph,
    check_tensor,
    inner_contiguous,
    message,
)
from grand_fast.ops.edge_attention import (
    EDGE_ORDERS,
    EdgeOrder,
    check_edge_weight,
    check_query_key,
    edge_inputs,
    to_slots,
)
from grand_fast.ops.scores import AbstractScore, check_attention

_OP = "attention_product"


@autocast_inputs
@promoted_edges("edge_weight")
def attention_product(
    values: Float[Tensor, "N H d"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    graph: Graph,
    *,
    reduce: Literal["mean", "cat"] = "mean",
    edge_key: Float[Tensor, "E H d_k"] | None = None,
    edge_value: Float[Tensor, "E H d"] | None = None,
    score: str | AbstractScore = "scaled_dot",
    normalizer: str = "softmax",
    normalize: str = "receiver",
    edge_weight: Float[Tensor, " E"] | None = None,
    edge_order: EdgeOrder = "user",
    backend: Backend = "auto",
) -> Float[Tensor, "N d"] | Float[Tensor, "N Hd"]:
    """Multi-head attention over the edges, with values per head: a graph transformer's layer.

    `y^h_i = Σ_j a^h_ij (values^h_j + edge_value^h_ij)`, with
    `a^h_i: = softmax_j(<q^h_i, k^h_j + edge_key^h_ij> / √d_k)` over the senders `j` of receiver `i`

    Args:
        values: `[N, H, d]`, those of senders.
        q, k: queries of receivers and keys of senders, `[N, H, d_k]`, dtype and device of `values`.
        graph: the edges; a node that receives none gets 0.
        reduce: what becomes of the heads: `"mean"`, `[N, d]`; or `"cat"`, side by side `[N, H·d]`.
        edge_key: `[E, H, d_k]`, added to the keys; of the scores scaled_dot and gat (`d_k` = 1),
            with the normaliser softmax.
        edge_value: `[E, H, d]`, added to the values. The same tensor may be both.
        score, normalizer, normalize, edge_weight: as in `edge_attention`.
        edge_order: order of `edge_key` and `edge_value`: `"user"`, that of the edge index given to
            `Graph` (appended loops last), or `"csr"`, that of `graph.col`, which saves a copy of
            each.
        backend: `"auto"` goes by the device of `values`.

    Returns:
        `y` in the dtype of `values`.

    Differentiable by every tensor and the parameters of `score`. Saves its inputs and
    `norm [N, 2, H]`; no weights, and nothing of size `E` but edge tables and their gradients.
    Reference: Shi et al. 2021 (UniMP), equations 3 and 4, which is PyG's `TransformerConv`;
    Veličković et al. 2018 with score `"gat"`.
    """
    check_graph(_OP, graph)
    n, e = graph.num_nodes, graph.num_edges
    letters = "[N, H, d]"
    check_tensor(_OP, "values", values, letters=letters, sizes=(n, None, None), graph=graph)
    check_query_key(_OP, q, k, graph, like=values)
    h, d_k = q.shape[1:]
    check_tensor(_OP, "values", values, letters=letters, sizes=(n, h, None))
    score_object, weighting = check_attention(_OP, score, normalizer, normalize, d_k)
    for name, table, width in (("edge_key", edge_key, d_k), ("edge_value", edge_value, None)):
        if table is not None:
            letters, last = ("[E, H, d_k]", d_k) if width else ("[E, H, d]", values.shape[2])
            check_tensor(_OP, name, table, letters=letters, sizes=(e, h, last), like=values)
    check_edge_weight(_OP, edge_weight, graph, values)
    check_choice(_OP, "reduce", reduce, known=("mean", "cat"))
    check_choice(_OP, "edge_order", edge_order, known=EDGE_ORDERS)
    edge_key = _prepared(edge_key, score_object, normalizer)
    if edge_order == "user":
        is_both = edge_key is edge_value
        edge_key = None if edge_key is None else to_slots(edge_key, graph)
        if edge_value is not None:
            edge_value = edge_key if is_both else to_slots(edge_value, graph)
    name = choose(_OP, backend, values)
    call = Call(graph, name, weighting, mean_heads=reduce == "mean")
    q, k = (inner_contiguous(t) for t in score_object.prepare(q, k))
    w, top = edge_inputs(q, k, edge_weight, weighting=weighting, graph=graph, name=name)
    tables = (
        None if t is None else inner_contiguous(t).contiguous() for t in (edge_key, edge_value)
    )
    y = _operator(call, inner_contiguous(values), q, k, *tables, w, top)
    return y if reduce == "mean" else y.flatten(1)


def _prepared(edge_key: Tensor | None, score: AbstractScore, normalizer: str) -> Tensor | None:
    """What is added to the prepared keys.

    Raises:
        NotImplementedError: the score is no function of a sum of keys; or squareplus, which counts
            from the largest score of all edges.
    """
    if edge_key is None:
        return None
    made = score.prepare_edges(edge_key)
    if made is None or normalizer != "softmax":
        expected = "must be None but for the scores scaled_dot and gat with the normaliser softmax"
        got = f"a Tensor with score '{score.name}' and normalizer '{normalizer}'"
        raise NotImplementedError(message(_OP, "edge_key", expected, got))
    return made


def _forward(
    call: Call, v: Tensor, q: Tensor, k: Tensor, edge_key: Tensor | None,
    edge_value: Tensor | None, edge_weight: Tensor | None, top: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    on = call.on(_OP)
    y, norm = on.kernels.attention_product_fwd(
        v, q, k, weighting=call.weighting, edge_key=edge_key, edge_value=edge_value,
        edge_weight=edge_weight, top=top, mean_heads=call.mean_heads, csr=on.csr, csr_t=on.csr_t,
    )  # fmt: skip
    return y, (norm,)


def _backward(
    call: Call, dy: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool
) -> Gradients:
    v, q, k, edge_key, edge_value, edge_weight, top = inputs
    on = call.on(_OP)
    grads: ProductGradients = on.kernels.attention_product_bwd(
        dy, v, q, k=k, weighting=call.weighting, edge_key=edge_key, edge_value=edge_value,
        edge_weight=edge_weight, top=top, norm=saved[0], csr=on.csr, csr_t=on.csr_t,
        needs_dv=needs[0], needs_dqk=any((*needs[1:4], *needs[5:])), needs_dedge_key=needs[3],
        needs_dedge_value=needs[4], needs_dedge_weight=needs[5],
    )  # fmt: skip
    return grads


def _fake(call: Call, v: Tensor, q: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    n, h, d = v.shape
    y = v.new_empty([n, d] if call.mean_heads else [n, h, d])
    return y, q.new_empty([n, 2, h], dtype=wide)


_operator = Operator(
    _OP, inputs=("v", "q", "k", "edge_key?", "edge_value?", "edge_weight?", "top?"),
    options=("weighting", "mean_heads"), saves=1, forward=_forward, backward=_backward, fake=_fake,
)  # fmt: skip
