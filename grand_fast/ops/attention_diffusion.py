"""`attention_diffusion`: GRAND's vector field, edge attention and aggregation in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.kernels.csr import Add
from grand_fast.kernels.weighting import AttentionGradients
from grand_fast.ops._autograd import Gradients, Operator
from grand_fast.ops._input_types import autocast_inputs, promoted_edges
from grand_fast.ops.backends import Backend, choose
from grand_fast.ops.calls import Call, Resolved
from grand_fast.ops.checks import (
    channel_vector,
    check_add,
    check_graph,
    check_source,
    check_tensor,
    inner_contiguous,
)
from grand_fast.ops.edge_attention import check_edge_weight, check_query_key, edge_inputs
from grand_fast.ops.scores import AbstractScore, check_attention

_OP = "attention_diffusion"


@autocast_inputs
@promoted_edges("edge_weight")
def attention_diffusion(
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    graph: Graph,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor | None = None,
    x0: Float[Tensor, "N d"] | None = None,
    score: str | AbstractScore = "scaled_dot",
    normalizer: str = "softmax",
    normalize: str = "receiver",
    edge_weight: Float[Tensor, " E"] | None = None,
    add: Add = (),
    backend: Backend = "auto",
) -> Float[Tensor, "N d"]:
    """The vector field of GRAND: edge attention, softmax and diffusion, fused.

    `f_i = alpha (mean_h Σ_j a^h_ij x_j − x_i) + beta x0_i`, with
    `a^h_i: = softmax_j(<q^h_i, k^h_j> / √d_k)` over the senders `j` of receiver `i`.

    Args:
        x: node state `[N, d]`, shared by all heads.
        q, k: queries of receivers and keys of senders, `[N, H, d_k]`, dtype and device of `x`.
        graph: the edges; a node without edges gets `−alpha x_i + beta x0_i`.
        alpha: diffusivity scale, a float, or a tensor (scalar, `[d]` or `[1, d]`).
        beta, x0: source scale, like `alpha`, and source `[N, d]`; both or neither.
        score, normalizer, normalize, edge_weight: as in `edge_attention`.
        add: pairs `(c, y)` of a float and a tensor `[N, d]`; `Σ c y` is added to `f` in the same
            pass, as the stages of a solver do.
        backend: `"auto"` goes by the device of `x`.

    Returns:
        `f` `[N, d]`, in the dtype of `x`.

    Differentiable by `x`, `q`, `k`, `alpha`, `beta`, `x0`, each `y`, `edge_weight` and the
    parameters of `score`. Saves its inputs and `norm [N, 2, H]`; nothing of size `E` is stored, the
    weights are recomputed in backward.
    Reference: GRAND (Chamberlain et al. 2021), equations 2, 10 and 13.
    """
    check_graph(_OP, graph)
    check_tensor(_OP, "x", x, letters="[N, d]", sizes=(graph.num_nodes, None), graph=graph)
    check_query_key(_OP, q, k, graph, like=x)
    score_object, weighting = check_attention(_OP, score, normalizer, normalize, q.shape[2])
    check_edge_weight(_OP, edge_weight, graph, x)
    alpha = channel_vector(_OP, "alpha", alpha, x)
    beta, x0 = check_source(_OP, beta, x0, x)
    x_scale, scales, others = check_add(_OP, add, x)
    name = choose(_OP, backend, x)
    call = Call(graph, name, weighting, x_scale=x_scale, scales=scales)
    q, k = (inner_contiguous(t) for t in score_object.prepare(q, k))
    w, top = edge_inputs(q, k, edge_weight, weighting=weighting, graph=graph, name=name)
    return _operator(call, inner_contiguous(x), q, k, alpha, w, top, beta, x0, *others)


@autocast_inputs
def mixed_values(
    values: Sequence[Tensor], q: Tensor, k: Tensor, graph: Graph, *, score: str | AbstractScore,
    normalizer: str, normalize: str, edge_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """`mean_h A^h v^h` `[N, d_v]` of `H` tensors `v^h` `[N, d_v]`; the rest as `edge_attention`.

    A call of the diffusion kernels for each head, with `v^h` as its state and added again:
    `(A^h v^h − v^h + v^h) / H`, on top of the heads before. Nothing of size `E` is stored.
    """
    score_object, weighting = check_attention(_OP, score, normalizer, normalize, q.shape[2])
    name = choose(_OP, "auto", values[0])
    q, k = score_object.prepare(q, k)
    w, top = edge_inputs(q, k, edge_weight, weighting=weighting, graph=graph, name=name)
    share = 1 / len(values)
    alpha = channel_vector(_OP, "alpha", share, values[0])
    before: list[Tensor] = []
    call = Call(graph, name, weighting, x_scale=share)
    for v, q_h, k_h in zip(values, q.unbind(1), k.unbind(1), strict=True):
        given = (inner_contiguous(t) for t in (v, q_h.unsqueeze(1), k_h.unsqueeze(1)))
        mixed = _operator(call, *given, alpha, w, top, None, None, *before)
        call, before = call._replace(scales=(1.0,)), [mixed]
    return mixed


def _forward(
    call: Call, x: Tensor, q: Tensor, k: Tensor, alpha: Tensor, edge_weight: Tensor | None,
    top: Tensor | None, beta: Tensor | None, x0: Tensor | None, *others: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    on = call.on(_OP)
    f, norm = on.kernels.attention_diffusion_fwd(
        x, q, k, weighting=call.weighting, edge_weight=edge_weight, top=top,
        alpha=call.scaled(alpha), beta=beta, x0=x0, add=call.add(x, others), csr=on.csr,
        csr_t=on.csr_t,
    )  # fmt: skip
    return f, (norm,)


def _backward(
    call: Call, df: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool,
    on: Resolved | None = None, may_overwrite_k: bool = False,
) -> Gradients:  # fmt: skip
    x, q, k, alpha, edge_weight, top = inputs
    needs_dx, needs_dq, needs_dk, needs_dalpha, needs_dedge_weight, needs_dtop = needs
    on = on or call.on(_OP)
    grads: AttentionGradients = on.kernels.attention_diffusion_bwd(
        df, x, q, k=k, weighting=call.weighting, edge_weight=edge_weight, top=top, norm=saved[0],
        alpha=call.scaled(alpha), x_scale=call.x_scale, csr=on.csr, csr_t=on.csr_t,
        needs_dqk=needs_dq or needs_dk or needs_dedge_weight or needs_dtop,
        needs_dalpha=needs_dalpha, needs_dedge_weight=needs_dedge_weight,
        may_overwrite_k=may_overwrite_k,
    )  # fmt: skip
    dalpha = None if grads.dalpha is None else call.scaled(grads.dalpha)
    return grads.dx, grads.dq, grads.dk, dalpha, grads.dedge_weight, grads.dtop


def _fake(call: Call, x: Tensor, q: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), q.new_empty([q.shape[0], 2, q.shape[1]], dtype=wide)


_operator = Operator(
    _OP, inputs=("x", "q", "k", "alpha", "edge_weight?", "top?"),
    options=("weighting", "x_scale", "scales"), has_source=True, saves=1, forward=_forward,
    backward=_backward, fake=_fake,
)  # fmt: skip
