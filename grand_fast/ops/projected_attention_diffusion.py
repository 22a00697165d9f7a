"""`projected_attention_diffusion`: from the state to GRAND's vector field, projections included.

It runs on the kernels of `attention_diffusion`. Knowing the projections saves memory and passes:
one product for q and k together, its backward added to `dx` in place, q and k kept for backward
only while memory is plentiful, what a score makes of them computed again, and dk written over k.
"""

import math
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from grand_fast.graph import Graph
from grand_fast.kernels.csr import Add
from grand_fast.kernels.weighting import AttentionGradients
from grand_fast.ops._add import check_add, pairs
from grand_fast.ops._autocast import autocast_inputs
from grand_fast.ops._autograd import Gradients, Operator
from grand_fast.ops._call import Call
from grand_fast.ops._largest_score import add_top_gradients, find_top, reference_top
from grand_fast.ops._projection import add_input_gradient, parameter_gradients, project
from grand_fast.ops._promotion import promoted_edges
from grand_fast.ops._score_columns import prepared, score_gradients, side_by_side
from grand_fast.ops.backends import Backend, choose, launchers, plan
from grand_fast.ops.checks import (
    channel_vector,
    check_graph,
    check_source,
    check_tensor,
    inner_contiguous,
    message,
)
from grand_fast.ops.edge_attention import check_edge_weight
from grand_fast.ops.edge_order import to_slots
from grand_fast.ops.recompute import is_lean, lean_share
from grand_fast.ops.scores import SCORES, AbstractScore, ExpKernel, ScaledDot, check_attention

_OP = "projected_attention_diffusion"
_KERNELS = "attention_diffusion"

# Keeping q and k for backward saves one of its three products. They are kept when small, or when
# they take less than this share of the free memory: a long solve keeps them for its first
# evaluations and stops before memory runs short.
_ALWAYS_KEPT = 16 << 20  # bytes
_SHARE_KEPT = 1 / 32


@autocast_inputs
@promoted_edges("edge_weight")
def projected_attention_diffusion(
    x: Float[Tensor, "N d"],
    weight: Float[Tensor, "2*d_att d"],
    bias: Float[Tensor, " 2*d_att"],
    graph: Graph,
    *,
    heads: int,
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
    """`attention_diffusion` with `q, k = x weightᵀ + bias`, as one operator.

    `f_i = alpha (mean_h Σ_j a^h_ij x_j − x_i) + beta x0_i`, with
    `a^h_i: = softmax_j(<q^h_i, k^h_j> / √d_k)` over the senders `j` of receiver `i`.

    Args:
        x: node state `[N, d]`.
        weight, bias: of the queries, then of the keys, `[2·d_att, d]` and `[2·d_att]`.
        graph: the edges.
        heads: `H`; must divide `d_att`.
        alpha, beta, x0, score, normalizer, normalize, edge_weight, add, backend: as in
            `attention_diffusion`.

    Returns:
        `f` `[N, d]`, in the dtype of `x`.

    Differentiable by `x`, `weight`, `bias`, `alpha`, `beta`, `x0`, each tensor of `add`,
    `edge_weight` and the parameters of `score`. Saves its inputs, `norm [N, 2, H]` and, while
    memory is plentiful, q and k.
    Reference: GRAND (Chamberlain et al. 2021), equations 2, 10 and 13.
    """
    check_graph(_OP, graph)
    check_tensor(_OP, "x", x, letters="[N, d]", sizes=(graph.num_nodes, None), graph=graph)
    sizes = (None, x.shape[1])
    check_tensor(_OP, "weight", weight, letters="[2·d_att, d]", sizes=sizes, like=x)
    check_tensor(_OP, "bias", bias, letters="[2·d_att]", sizes=(weight.shape[0],), like=x)
    if not isinstance(heads, int):
        raise TypeError(message(_OP, "heads", "must be an int", type(heads).__name__))
    if heads < 1 or weight.shape[0] % (2 * heads):
        got = f"{heads} for 2·d_att = {weight.shape[0]}"
        raise ValueError(message(_OP, "heads", "must divide d_att", got))
    d_k = weight.shape[0] // (2 * heads)
    of_score, weighting = check_attention(_OP, score, normalizer, normalize, d_k)
    check_edge_weight(_OP, edge_weight, graph, x)
    alpha = channel_vector(_OP, "alpha", alpha, x)
    beta, x0 = check_source(_OP, beta, x0, x)
    of_x, scales, others = check_add(_OP, add, x)
    name = choose(_OP, backend, x)
    w = None if edge_weight is None else to_slots(edge_weight, graph)
    call = Call(graph, name, weighting, heads, of_score.name, of_x=of_x, scales=scales)
    tensors = (inner_contiguous(x), weight, bias, alpha, w, *of_score.parameters(x))
    return _operator(call, *tensors, beta, x0, *others)


def _forward(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    edge_weight: Tensor | None,
    sigma: Tensor | None,
    lengthscale: Tensor | None,
    beta: Tensor | None,
    x0: Tensor | None,
    *others: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    absorbed = _is_absorbed(x, weight, edge_weight, call)
    if absorbed:
        qk = x.new_empty(0, weight.shape[0])
        q, k = _absorbed(x, weight, bias)
    else:
        qk = project(x, weight, bias, call.backend)
        q, k = _split(qk, call.heads)
        q, k = prepared(_score(call, sigma, lengthscale).about(k), q, k, call.backend)
    top, *of_rows = _top(call, q, k, edge_weight)
    of_backend = plan(call.backend)
    f, norm = launchers(_KERNELS, call.backend).attention_diffusion_fwd(
        x,
        q,
        k,
        weighting=None if absorbed else call.weighting,
        edge_weight=edge_weight,
        top=top,
        alpha=alpha,
        beta=beta,
        x0=x0,
        add=pairs(x, call.of_x, call.scales, others),
        csr=call.graph.csr(of_backend),
        csr_t=call.graph.csr(of_backend, transposed=True),
    )
    # As many tensors are saved either way: torch.utils.checkpoint runs this twice and compares.
    if absorbed or not _is_kept(qk, x):
        qk = qk.new_empty(1).expand(x.shape[0], weight.shape[0])
    return f, (norm, qk) if top is None else (norm, qk, top, *of_rows)


def _backward(
    call: Call, df: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool
) -> Gradients:
    x, weight, bias, alpha, edge_weight, *parameters = inputs
    needs_dx, needs_dweight, needs_dbias, needs_dalpha, needs_dedge_weight = needs[:5]
    needs_dqk = needs_dx or needs_dweight or needs_dbias or any(needs[5:])
    norm, *kept = saved
    # dk may take the place of k, so that q and k that were kept serve once.
    if first and kept and kept[0].stride(1) != 0:  # 0: the placeholder
        qk = kept[0]
    else:
        qk = project(x, weight, bias, call.backend)
    qk = qk.data  # a saved tensor that changes is an error
    given = _split(qk, call.heads)
    score = _score(call, *parameters).about(given[1])
    q, k = made = prepared(score, *given, call.backend)
    top, *of_rows = kept[1:] or _top(call, q, k, edge_weight)
    if _is_absorbed(x, weight, edge_weight, call):
        # Its scores lack what the keys' bias adds to a row, and are rounded otherwise: the pass
        # that gives dq and dk divides by the sum it finds, and for that alone the shift will do.
        needs_dqk = True
        shift = norm[:, :1] + ((q @ bias.chunk(2)[1]) / math.sqrt(k.shape[2]))[:, None]
        norm = torch.cat([shift, norm[:, 1:]], 1)
    of_backend = plan(call.backend)
    grads: AttentionGradients = launchers(_KERNELS, call.backend).attention_diffusion_bwd(
        df,
        x,
        q,
        k=k,
        weighting=call.weighting,
        edge_weight=edge_weight,
        top=top,
        norm=norm,
        alpha=alpha,
        df_scale=call.of_x,
        csr=call.graph.csr(of_backend),
        csr_t=call.graph.csr(of_backend, transposed=True),
        needs_dqk=needs_dqk or needs_dedge_weight,
        needs_dalpha=needs_dalpha,
        needs_dedge_weight=needs_dedge_weight,
        may_overwrite_k=top is None and call.score == ScaledDot.name,  # else it is needed after
    )
    if grads.dtop is not None:
        (top_of_row,) = of_rows
        assert top_of_row is not None
        of_edges = (grads.dq, grads.dk, grads.dedge_weight)
        add_top_gradients(call, grads.dtop, (q, k, edge_weight), top_of_row, of_edges)
    dweight = dbias = None
    dsigma = dlengthscale = None
    if grads.dq is not None and grads.dk is not None:
        of_made = (grads.dq, grads.dk)
        *dqk, dsigma, dlengthscale = score_gradients(score, given, made, of_made, call.backend)
        joined = side_by_side(*dqk)
        dqk = [inner_contiguous(dy.flatten(1)) for dy in dqk] if joined is None else [joined]
        if needs_dx and grads.dx is not None:
            for dy, part in zip(dqk, weight.chunk(len(dqk)), strict=True):
                add_input_gradient(grads.dx, dy, part, call.backend)
        if needs_dweight or needs_dbias:
            shares = [parameter_gradients(dy, x, call.backend) for dy in dqk]
            dweight, dbias = map(torch.cat, zip(*shares, strict=True))
    of_field = (grads.dx, dweight, dbias, grads.dalpha, grads.dedge_weight)
    return *of_field, dsigma, dlengthscale


def _reference(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: Tensor,
    edge_weight: Tensor | None,
    sigma: Tensor | None,
    lengthscale: Tensor | None,
    beta: Tensor | None,
    x0: Tensor | None,
    *others: Tensor,
) -> Tensor:
    qk = functional.linear(x, weight, bias)
    q, k = _score(call, sigma, lengthscale).prepare(*_split(qk, call.heads))
    f, _ = launchers(_KERNELS, "reference").attention_diffusion_fwd(
        x,
        q,
        k,
        weighting=call.weighting,
        edge_weight=edge_weight,
        top=reference_top(call, q, k, edge_weight) if _has_top(call) else None,
        alpha=alpha,
        beta=beta,
        x0=x0,
        add=pairs(x, call.of_x, call.scales, others),
        csr=call.graph.csr(),
    )
    return f  # type: ignore[no-any-return]


def _fake(call: Call, x: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2, call.heads), dtype=wide)


_operator = Operator(
    _OP,
    inputs=("x", "weight", "bias", "alpha", "edge_weight?", "sigma?", "lengthscale?"),
    options=("weighting", "heads", "score", "of_x", "scales"),
    has_source=True,
    saves=1,  # norm; a compiled program projects again in backward rather than hold q and k
    forward=_forward,
    backward=_backward,
    reference=_reference,
    fake=_fake,
)


def _score(call: Call, sigma: Tensor | None, lengthscale: Tensor | None) -> AbstractScore:
    if sigma is None or lengthscale is None:
        return SCORES[call.score]
    return ExpKernel(sigma, lengthscale)


def _has_top(call: Call) -> bool:
    return call.weighting is not None and call.weighting.normalizer == "squareplus"


def _top(call: Call, q: Tensor, k: Tensor, edge_weight: Tensor | None) -> Sequence[Tensor | None]:
    """The largest score and that of each row and head, where the normaliser counts from it."""
    if not _has_top(call):
        return (None,)
    top, (top_of_row,) = find_top(call, q, k, edge_weight)
    return top, top_of_row


def _is_absorbed(x: Tensor, weight: Tensor, edge_weight: Tensor | None, call: Call) -> bool:
    """Whether queries that hold the projection of the keys too save bytes and flops.

    With several heads they are H rows of d channels, and their product takes longer than half of
    the gather saves. In half types they would be rounded twice. Only a softmax over a row forgets
    what is constant there.
    """
    if call.score != ScaledDot.name or edge_weight is not None:
        return False
    if _has_top(call) or (call.weighting and call.weighting.normalize == "sender"):
        return False
    d_att = weight.shape[0] // 2
    of_gpu = call.backend == "gpu" and x.dtype == torch.float32
    return of_gpu and call.heads == 1 and x.shape[1] <= 2 * d_att


def _absorbed(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """q̃ = W_kᵀ (W_q x + b_q) and x in place of the keys, `[N, 1, d]`; equal up to a row's constant.

    The kernel divides by √d where √d_att is due.
    """
    (w_q, w_k), b_q = weight.chunk(2), bias.chunk(2)[0]
    scale = math.sqrt(w_k.shape[1] / w_k.shape[0])
    q = functional.linear(x, scale * (w_k.t() @ w_q), scale * (w_k.t() @ b_q))
    return q.unsqueeze(1), x.unsqueeze(1)


def _split(qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """q and k `[N, H, d_k]` as views."""
    q, k = qk.view(qk.shape[0], 2, heads, qk.shape[1] // (2 * heads)).unbind(1)
    return q, k


def _is_kept(qk: Tensor, x: Tensor) -> bool:
    size = qk.numel() * qk.element_size()
    if is_lean():
        return size <= lean_share() * x.numel() * x.element_size()
    if size <= _ALWAYS_KEPT:
        return True
    if qk.is_cuda:
        free = torch.cuda.mem_get_info(qk.device)[0]
    else:
        free = psutil.virtual_memory().available
    return size < _SHARE_KEPT * free
