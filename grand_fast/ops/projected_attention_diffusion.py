"""`projected_attention_diffusion`: from the state to GRAND's vector field, projections included.

It runs on the kernels of `attention_diffusion`. Knowing the projections saves memory and passes:
one product for q and k together, its backward added to `dx` in place, q and k kept for backward
only while memory is plentiful, and dk written over k.
"""

import math
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from grand_fast.graph import Graph
from grand_fast.kernels._csr import Add
from grand_fast.kernels._weighting import AttentionGradients, scaled_dot
from grand_fast.ops._add import check_add, gradients, pairs
from grand_fast.ops._checks import (
    channel_vector,
    check_graph,
    check_source,
    check_tensor,
    inner_contiguous,
    message,
)
from grand_fast.ops._dispatch import Backend, choose, launchers, plan, projection
from grand_fast.ops._scores import AbstractScore, check_attention
from grand_fast.ops._source import source_gradients
from grand_fast.ops.attention_diffusion import attention_diffusion
from grand_fast.ops.edge_attention import check_edge_weight

_OP = "projected_attention_diffusion"
_KERNELS = "attention_diffusion"

# Keeping q and k for backward saves one of its three products. They are kept when small, or when
# they take less than this share of the free memory: a long solve keeps them for its first
# evaluations and stops before memory runs short.
_ALWAYS_KEPT = 16 << 20  # bytes
_SHARE_KEPT = 1 / 32


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
            `attention_diffusion`. Only the paper's choices, the defaults, make one operator of it;
            with others the projections are operators of their own, whose results are kept.

    Returns:
        `f` `[N, d]`, in the dtype of `x`.

    Differentiable by `x`, `weight`, `bias`, `alpha`, `beta`, `x0` and each tensor of `add`. Saves
    its inputs, `lse [N, H]` and, while memory is plentiful, q and k.
    Reference: GRAND (Chamberlain et al. 2021), equations 2 and 10.
    """
    check_graph(_OP, graph)
    check_tensor(_OP, "x", x, letters="[N, d]", sizes=(graph.num_nodes, None), graph=graph)
    sizes = (None, x.shape[1])
    check_tensor(_OP, "weight", weight, letters="[2·d_att, d]", sizes=sizes, like=x)
    check_tensor(_OP, "bias", bias, letters="[2·d_att]", sizes=(weight.shape[0],), like=x)
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
    if name != "reference" and weighting == scaled_dot(d_k) and edge_weight is None:
        f: Tensor = _ProjectedAttentionDiffusionFunction.apply(
            x, weight, bias, alpha, beta, x0, graph, name, heads, of_x, scales, *others
        )
        return f
    q, k = _split(functional.linear(x, weight, bias), heads)
    return attention_diffusion(
        x,
        q,
        k,
        graph,
        alpha=alpha,
        beta=beta,
        x0=x0,
        score=of_score,
        normalizer=normalizer,
        normalize=normalize,
        edge_weight=edge_weight,
        add=add,
        backend=name,  # type: ignore[arg-type]
    )


class _ProjectedAttentionDiffusionFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        alpha: Tensor,
        beta: Tensor | None,
        x0: Tensor | None,
        graph: Graph,
        name: str,
        heads: int,
        of_x: float,
        scales: tuple[float, ...],
        *others: Tensor,
    ) -> Tensor:
        x = inner_contiguous(x)
        if x0 is not None:
            x0 = inner_contiguous(x0)
        ctx.absorbed = name == "gpu" and _is_absorbed(x, weight, heads)
        if ctx.absorbed:
            qk = x.new_empty(0, weight.shape[0])
            q, k = _absorbed(x, weight, bias)
        else:
            qk = _project(x, weight, bias, name)
            q, k = _split(qk, heads)
        f, lse = launchers(_KERNELS, name).attention_diffusion_fwd(
            x,
            q,
            k,
            alpha=alpha,
            beta=beta,
            x0=x0,
            add=pairs(x, of_x, scales, [inner_contiguous(y) for y in others]),
            csr=graph.csr(plan(name)),
        )
        # As many tensors are saved either way: torch.utils.checkpoint runs this twice and compares.
        ctx.kept = not ctx.absorbed and _is_kept(qk)
        kept = qk if ctx.kept else qk.new_empty(1).expand(x.shape[0], weight.shape[0])
        ctx.save_for_backward(
            x, weight, bias, kept, lse, alpha, beta, x0 if ctx.needs_input_grad[4] else None
        )
        ctx.graph, ctx.name, ctx.heads, ctx.of_x, ctx.scales = graph, name, heads, of_x, scales
        return f  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, qk, lse, alpha, beta, x0 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_dx, needs_dweight, needs_dbias, needs_dalpha, needs_dbeta, needs_dx0 = needs[:6]
        df = inner_contiguous(df)
        grads = AttentionGradients()
        dweight = dbias = None
        if needs_dx or needs_dweight or needs_dbias or needs_dalpha:
            needs_dqk = needs_dx or needs_dweight or needs_dbias
            if not ctx.kept or qk.stride(1) == 0:  # another run's placeholder
                qk = _project(x, weight, bias, ctx.name)
            # They are nobody else's, so dk may take the place of k; a second backward through a
            # retained graph computes them again.
            ctx.kept &= not needs_dqk
            q, k = _split(qk.data, ctx.heads)  # .data: a saved tensor that changes is an error
            if ctx.absorbed:  # its scores leave out what the keys' bias adds to a row
                lse = lse + (q @ bias.chunk(2)[1]) / math.sqrt(k.shape[2])
            grads = launchers(_KERNELS, ctx.name).attention_diffusion_bwd(
                df,
                x,
                q,
                k=k,
                lse=lse,
                alpha=alpha,
                df_scale=ctx.of_x,
                csr=ctx.graph.csr(plan(ctx.name)),
                csr_t=ctx.graph.csr(plan(ctx.name), transposed=True),
                needs_dqk=needs_dqk,
                needs_dalpha=needs_dalpha,
                may_overwrite_k=True,
            )
            if grads.dq is not None and grads.dk is not None:
                dqk = (grads.dq.flatten(1), grads.dk.flatten(1))
                if needs_dx and grads.dx is not None:
                    for dy, part in zip(dqk, weight.chunk(2), strict=True):
                        _add_input_gradient(grads.dx, dy, part, ctx.name)
                if needs_dweight or needs_dbias:
                    shares = [_parameter_gradients(dy, x, ctx.name) for dy in dqk]
                    dweight, dbias = map(torch.cat, zip(*shares, strict=True))
        dbeta, dx0 = source_gradients(df, beta, x0, needs_dbeta, needs_dx0)
        dothers = gradients(df, ctx.scales, needs[11:])
        none = (None,) * 5  # graph, name, heads, of_x, scales
        return grads.dx, dweight, dbias, grads.dalpha, dbeta, dx0, *none, *dothers


def _is_absorbed(x: Tensor, weight: Tensor, heads: int) -> bool:
    """Whether queries that hold the projection of the keys too save bytes and flops.

    With several heads they are H rows of d channels, and their product takes longer than half of
    the gather saves. In half types they would be rounded twice.
    """
    d_att = weight.shape[0] // 2
    return heads == 1 and x.shape[1] <= 2 * d_att and x.dtype == torch.float32


def _absorbed(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """q̃ = W_kᵀ (W_q x + b_q) and x in place of the keys, `[N, 1, d]`; equal up to a row's constant.

    The kernel divides by √d where √d_att is due.
    """
    (w_q, w_k), b_q = weight.chunk(2), bias.chunk(2)[0]
    scale = math.sqrt(w_k.shape[1] / w_k.shape[0])
    q = functional.linear(x, scale * (w_k.t() @ w_q), scale * (w_k.t() @ b_q))
    return q.unsqueeze(1), x.unsqueeze(1)


def _project(x: Tensor, weight: Tensor, bias: Tensor, name: str) -> Tensor:
    """q and k, side by side, `[N, 2·d_att]`."""
    if name == "cpu":
        return projection().project(x, weight, bias)  # type: ignore[no-any-return]
    return functional.linear(x, weight, bias)


def _add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor, name: str) -> None:
    if name == "cpu":
        projection().add_input_gradient(dx, dy, weight)
    else:
        dx.addmm_(dy, weight)


def _parameter_gradients(dy: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias."""
    if name == "cpu":
        return projection().parameter_gradients(dy, x)  # type: ignore[no-any-return]
    return dy.t() @ x, dy.sum(0)


def _split(qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """q and k `[N, H, d_k]` as views."""
    view = qk.view(qk.shape[0], 2, heads, qk.shape[1] // (2 * heads))
    return view[:, 0], view[:, 1]


def _is_kept(qk: Tensor) -> bool:
    size = qk.numel() * qk.element_size()
    if size <= _ALWAYS_KEPT:
        return True
    if qk.is_cuda:
        free = torch.cuda.mem_get_info(qk.device)[0]
    else:
        free = psutil.virtual_memory().available
    return size < _SHARE_KEPT * free
