"""Backward of `edge_attention`: a row pass for dq and Delta, a column pass for dk.

They are named as where receivers normalise. Where senders do, the row pass goes over Aᵀ and gives
dk and Delta, the column pass over A and gives dq: q and k change places.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Csr
from grand_fast.kernels._triton_attention_backward import (
    add_dq_sums,
    add_scores,
    all_scores,
    dq_part,
    join_dk,
    join_dq,
    join_dq_sums,
    no_dq_sums,
    store_dq,
    store_dq_part,
    store_heads,
)
from grand_fast.kernels._triton_edge_scores import score_sizes
from grand_fast.kernels._triton_tiles import (
    add_weighted,
    edge_offsets,
    gather_heads,
    head_dot,
    heads_of,
    join_lanes,
    load_heads,
    load_per_head,
    load_piece,
    scaled,
    zeros,
)
from grand_fast.kernels._triton_weighting import (
    Scoring,
    edge_weight_gradient,
    load_edge_weight,
    load_slots,
    load_top,
    past_function,
    past_normalizer,
    scores,
    weight,
)

_VALUES = 16  # of a gathered tile, per lane: next to it two accumulators, or lse and Delta


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_bwd_dq_kernel(
    dq_ptr,
    lse_delta_ptr,
    part_ptr,
    da_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    weighting,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    score_scale,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    IS_MEAN: tl.constexpr,
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
    q = load_heads(q_ptr + row * stride_q_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
    q = scaled(q, score_scale)
    top = load_top(weighting)
    lse = load_per_head(lse_ptr + row * H, H, BLOCK_H, N_H, float("inf"))
    sums = no_dq_sums(BLOCK_G, BLOCK_H, BLOCK_A, N_A, N_H)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        slot = load_slots(slot_ptr, beg + e, offs_e, mask_e)
        w = load_edge_weight(weighting, slot, mask_e)
        u = head_dot(k, q, BLOCK_H, N_H, VEC_A)
        s = scores(u, w, weighting)
        p = ()
        for g in tl.static_range(N_H):
            p_g = weight(s[g], lse[g], weighting, top)
            p = p + (tl.where(mask_e[:, :, None], p_g, 0.0),)
        t = load_da(da_ptr, slot, mask_e, H, BLOCK_H, N_H, IS_MEAN)
        sums = add_dq_sums(sums, p, t, k, u, s, w, weighting, top, BLOCK_H, N_H)
    sum_p, sum_pt, sum_pk, sum_ptk = join_dq_sums(sums)
    if pid_p < n_split:
        store_dq_part(
            part_ptr + pid_p * (2 * N_A * BLOCK_A + 3 * N_H * BLOCK_H), sum_p, sum_pt, sum_pk,
            sum_ptk, 0.0, BLOCK_H, BLOCK_A, N_A, N_H,
        )  # fmt: skip
    else:
        store_dq(
            dq_ptr + row * (H * d_k), lse_delta_ptr + row * (2 * H), sum_p, sum_pt, sum_pk, sum_ptk,
            0.0, lse, scale, H, d_k, BLOCK_H, BLOCK_K, BLOCK_A, VEC_A, N_A, N_H,
        )  # fmt: skip


@triton.jit
def load_da(da_ptr, slot, mask_e, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr,
            IS_MEAN: tl.constexpr):  # fmt: skip
    """Gradients of the weights of [BLOCK_E, BLOCK_G] slots, N_H groups with a column per head.

    One column serves all heads of a group if `da` is that of the mean.
    """
    t = ()
    for g in tl.static_range(N_H):
        if IS_MEAN:
            at = da_ptr + slot[:, :, None].to(tl.int64)
            da = tl.load(at, mask=mask_e[:, :, None], other=0.0)
        else:
            at = da_ptr + slot[:, :, None].to(tl.int64) * H + heads_of(g, BLOCK_H)
            mask = mask_e[:, :, None] & (heads_of(g, BLOCK_H) < H)
            da = tl.load(at, mask=mask, other=0.0)
        t = t + (da.to(tl.float32),)
    return t


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_bwd_dk_kernel(
    dk_ptr,
    dw_ptr,
    dtop_ptr,
    part_ptr,
    da_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    weighting,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    stride_lse_n: tl.constexpr,
    score_scale,
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
    k = scaled(k, score_scale)
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
        lse_row = lse_ptr + i[:, :, None].to(tl.int64) * stride_lse_n
        ds = ()
        du = ()
        for g in tl.static_range(N_H):
            at = lse_row + heads_of(g, BLOCK_H)
            mask_eh = mask_e[:, :, None] & (heads_of(g, BLOCK_H) < H)
            lse = tl.load(at, mask=mask_eh, other=float("inf"))
            delta = tl.load(at + H, mask=mask_eh, other=0.0)
            ds_g = weight(s[g], lse, weighting, top) * (t[g] - delta)
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


def bwd_dq(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    lse: Float[Tensor, "N H"],
    scoring: Scoring,
    csr: Csr,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, "N 2 H"]]:
    """The row pass: dq, and per head lse beside Delta."""
    work, (n, h, d_k) = csr.work, q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_delta = torch.empty((n, 2, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return dq, lse_delta
    scale = scoring.scale / _heads_of_mean(da, h)
    sizes, blocks = score_sizes(h, d_k, q.dtype, _VALUES, per_head=True)
    part = dq_part(csr, sizes)
    _edge_attention_bwd_dq_kernel[(work.piece_row.numel(),)](
        dq,
        lse_delta,
        part,
        da_ptr=da,
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        weighting=scoring.weighting,
        col_ptr=csr.col,
        slot_ptr=csr.slot,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        score_scale=scoring.dot_scale,
        scale=scale,
        H=h,
        d_k=d_k,
        IS_MEAN=da.dim() == 1,
        **sizes,
        **blocks,
    )
    join_dq(dq, lse_delta, part, lse=lse, scale=scale, csr=csr, sizes=sizes)
    return dq, lse_delta


def bwd_dk(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    lse_delta: Float[Tensor, "N 2 H"],
    scoring: Scoring,
    csr: Csr,
    needs_dedge_weight: bool,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, " E"] | None, Float[Tensor, ""] | None]:
    """The column pass: dk, dedge_weight and dtop."""
    work, (n, h, d_k) = csr.work, q.shape
    programs, edge_weight = work.piece_row.numel(), scoring.weighting.edge_weight
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dw = part_top = None
    if needs_dedge_weight and edge_weight is not None:
        dw = torch.empty(edge_weight.shape, dtype=edge_weight.dtype, device=k.device)
    if scoring.weighting.top is not None:
        part_top = torch.empty((programs,), dtype=torch.float32, device=k.device)
    if n == 0:
        return dk, dw, None if part_top is None else part_top.sum()
    part = torch.empty((work.n_split, h * d_k), dtype=torch.float32, device=q.device)
    sizes, blocks = score_sizes(h, d_k, q.dtype, _VALUES, per_head=True)
    _edge_attention_bwd_dk_kernel[(programs,)](
        dk,
        dw,
        part_top,
        part_ptr=part,
        da_ptr=da,
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse_delta,
        weighting=scoring.weighting,
        col_ptr=csr.col,
        slot_ptr=csr.slot,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        stride_lse_n=lse_delta.stride(0),
        score_scale=scoring.dot_scale,
        scale=scoring.scale / _heads_of_mean(da, h),
        H=h,
        d_k=d_k,
        IS_MEAN=da.dim() == 1,
        HAS_DW=dw is not None,
        **sizes,
        **blocks,
    )
    join_dk(dk, part, csr=csr)
    dtop = None if part_top is None else part_top.sum() / -_heads_of_mean(da, h)
    return dk, dw, dtop


def _heads_of_mean(da: Tensor, h: int) -> int:
    """What a score's gradient is divided by; `da` of the mean counts each head 1/H."""
    return h if da.dim() == 1 else 1
