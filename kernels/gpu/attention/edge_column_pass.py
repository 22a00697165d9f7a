"""The column pass of the backward of `edge_attention`: dk, see `edge_backward.py`.

With it the gradients of edge weights, which need Delta, and by the largest score.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.backward import (
    add_scores,
    all_scores,
    join_dk,
    store_heads,
)
from grand_fast.kernels.gpu.attention.edge_backward import VALUES, heads_of_mean, load_da
from grand_fast.kernels.gpu.attention.scores import gather_norm
from grand_fast.kernels.gpu.attention.weighting import (
    KernelWeighting,
    edge_weight_gradient,
    load_edge_weight,
    load_slots,
    load_top,
    past_function,
    past_normalizer,
    scores,
    weight,
)
from grand_fast.kernels.gpu.sizes import score_sizes
from grand_fast.kernels.gpu.sums import add_weighted, head_dot, join_lanes, scaled, zeros
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_heads,
    gather_per_head,
    load_heads,
    load_piece,
)


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_bwd_dk_kernel(
    dk_ptr,
    dw_ptr,
    dtop_ptr,
    part_ptr,
    da_ptr,
    q_ptr,
    k_ptr,
    norm_delta_ptr,
    weighting,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HAS_DW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    k = load_heads(k_ptr + row * stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
    top = load_top(weighting)
    groups = zeros(N_A, BLOCK_G, BLOCK_A)
    top_groups = ()
    if weighting.top is not None:
        top_groups = zeros(N_H, BLOCK_G, BLOCK_H)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        i = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        slot = load_slots(slot_ptr, beg, e + offs_e, mask_e)
        q = gather_heads(q_ptr, i, mask_e, stride_q_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        w = load_edge_weight(weighting, slot, mask_e)
        u = head_dot(q, k, BLOCK_H, N_H, VEC_A)
        s = scores(u, w, weighting)
        t = load_da(da_ptr, slot, mask_e, H, BLOCK_H, N_H, IS_MEAN)
        shift, inverse = gather_norm(
            norm_delta_ptr, i, mask_e, weighting, 3 * H, True, H, BLOCK_H, N_H
        )
        rows = norm_delta_ptr + i[:, :, None].to(tl.int64) * (3 * H)
        delta = gather_per_head(rows, 2 * H, mask_e, 0.0, H, BLOCK_H, N_H)
        ds = ()
        du = ()
        for g in tl.static_range(N_H):
            ds_g = weight(s[g], shift[g], inverse[g], weighting, top) * (t[g] - delta[g])
            ds_g = past_normalizer(ds_g, s[g], weighting, top)
            ds = ds + (ds_g,)
            du = du + (past_function(ds_g, u[g], w, weighting),)
        groups = add_weighted(groups, du, q, BLOCK_H)
        if HAS_DW:
            dw = edge_weight_gradient(ds, u, weighting)
            if IS_MEAN:
                dw /= H
            tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=mask_e)
        if weighting.top is not None:
            top_groups = add_scores(top_groups, ds)
    dk = scaled(join_lanes(groups), scale)
    if pid_p < n_split:
        store_heads(part_ptr + pid_p * (H * d_k), dk, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
    else:
        store_heads(dk_ptr + row * (H * d_k), dk, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
    if weighting.top is not None:
        tl.store(dtop_ptr + pid_p, all_scores(top_groups))


def bwd_dk(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    norm_delta: Float[Tensor, "N 3 H"],
    weighting: KernelWeighting,
    csr: Csr,
    needs_dedge_weight: bool,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, " E"] | None, Float[Tensor, ""] | None]:
    """The column pass: dk, dedge_weight and dtop."""
    work, (n, h, d_k) = csr.work, q.shape
    programs, edge_weight = work.piece_row.numel(), weighting.edge_weight
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dw = part_top = None
    if needs_dedge_weight and edge_weight is not None:
        dw = torch.empty(edge_weight.shape, dtype=edge_weight.dtype, device=k.device)
    if weighting.top is not None:
        part_top = torch.empty((programs,), dtype=torch.float32, device=k.device)
    if n == 0:
        return dk, dw, None if part_top is None else part_top.sum()
    part = torch.empty((work.n_split, h * d_k), dtype=torch.float32, device=q.device)
    sizes, blocks = score_sizes(h, d_k, q.dtype, VALUES, per_head=True)
    _edge_attention_bwd_dk_kernel[(programs,)](
        dk,
        dw,
        part_top,
        part_ptr=part,
        da_ptr=da,
        q_ptr=q,
        k_ptr=k,
        norm_delta_ptr=norm_delta,
        weighting=weighting,
        col_ptr=csr.col,
        slot_ptr=csr.slot,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=weighting.scale / heads_of_mean(da, h),
        H=h,
        d_k=d_k,
        IS_MEAN=da.dim() == 1,
        HAS_DW=dw is not None,
        **sizes,
        **blocks,
    )
    join_dk(dk, part, csr=csr)
    dtop = None if part_top is None else part_top.sum() / -heads_of_mean(da, h)
    return dk, dw, dtop
