"""Backward of `edge_attention`: a row pass for dq and Delta, a column pass for dk."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Csr
from grand_fast.kernels._triton_attention_backward import (
    dq_part,
    join_dk,
    join_dq,
    store_dq,
    store_dq_part,
)
from grand_fast.kernels._triton_edge_scores import score_scale, weight
from grand_fast.kernels._triton_tiles import (
    by_head,
    edge_offsets,
    gather,
    head_columns,
    head_widths,
    load_piece,
    tile,
)

_TILE = 512  # elements of a gathered tile per warp: next to it two accumulators, or lse and Delta


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_bwd_dq_kernel(
    dq_ptr,
    lse_delta_ptr,
    part_ptr,
    da_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    col_ptr,
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
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    q = tl.load(q_ptr + row * stride_q_n + offs_a, mask=mask_a, other=0.0).to(tl.float32)
    q *= score_scale
    lse = tl.load(lse_ptr + row * H + offs_h, mask=mask_h, other=float("inf"))
    p_groups = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    pt_groups = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    pk_groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    ptk_groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = by_head(gather(k_ptr, j, mask_e, offs_a, mask_a, stride_k_n), BLOCK_H)
        p = weight(tl.sum(k * tl.reshape(q, [BLOCK_H, BLOCK_K]), 3), lse)
        p = tl.where(mask_e[:, :, None], p, 0.0)
        t = load_da(da_ptr, beg + e + offs_e, mask_e, offs_h, H, IS_MEAN)
        p_groups += tl.sum(p, 0)
        pt_groups += tl.sum(p * t, 0)
        pk_groups += tl.sum(p[:, :, :, None] * k, 0)
        ptk_groups += tl.sum((p * t)[:, :, :, None] * k, 0)
    sum_p = tl.sum(p_groups, 0)
    sum_pt = tl.sum(pt_groups, 0)
    sum_pk = tl.reshape(tl.sum(pk_groups, 0), [BLOCK_H * BLOCK_K])
    sum_ptk = tl.reshape(tl.sum(ptk_groups, 0), [BLOCK_H * BLOCK_K])
    if pid_p < n_split:
        store_dq_part(part_ptr, sum_p, sum_pt, sum_pk, sum_ptk, 0.0, pid_p, BLOCK_H, BLOCK_K)
    else:
        store_dq(
            dq_ptr, lse_delta_ptr, sum_p, sum_pt, sum_pk, sum_ptk, 0.0, lse, row, scale, H, d_k,
            BLOCK_H, BLOCK_K,
        )  # fmt: skip


@triton.jit
def load_da(da_ptr, slot, mask_e, offs_h, H: tl.constexpr, IS_MEAN: tl.constexpr):
    """Gradients of the weights of [BLOCK_E, BLOCK_G] slots, one column per head or one for all."""
    if IS_MEAN:
        t = tl.load(da_ptr + slot[:, :, None].to(tl.int64), mask=mask_e[:, :, None], other=0.0)
    else:
        at = da_ptr + slot[:, :, None].to(tl.int64) * H + offs_h
        t = tl.load(at, mask=mask_e[:, :, None] & (offs_h < H), other=0.0)
    return t.to(tl.float32)


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_bwd_dk_kernel(
    dk_ptr,
    part_ptr,
    da_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
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
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    k = tl.load(k_ptr + row * stride_k_n + offs_a, mask=mask_a, other=0.0).to(tl.float32)
    k = tl.reshape(k * score_scale, [BLOCK_H, BLOCK_K])
    groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        mask_eh = mask_e[:, :, None] & mask_h
        i = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        slot = tl.load(slot_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        q = by_head(gather(q_ptr, i, mask_e, offs_a, mask_a, stride_q_n), BLOCK_H)
        at = lse_ptr + (i[:, :, None].to(tl.int64) * stride_lse_n + offs_h)
        lse = tl.load(at, mask=mask_eh, other=float("inf"))
        delta = tl.load(at + H, mask=mask_eh, other=0.0)
        t = load_da(da_ptr, slot, mask_e, offs_h, H, IS_MEAN)
        ds = weight(tl.sum(q * k, 3), lse) * (t - delta)
        groups += tl.sum(ds[:, :, :, None] * q, 0)
    dk = scale * tl.reshape(tl.sum(groups, 0), [BLOCK_H * BLOCK_K])
    if pid_p < n_split:
        tl.store(part_ptr + pid_p * (H * d_k) + offs_a, dk, mask=mask_a)
    else:
        tl.store(dk_ptr + row * (H * d_k) + offs_a, dk.to(dk_ptr.dtype.element_ty), mask=mask_a)


def bwd_dq(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    lse: Float[Tensor, "N H"],
    csr: Csr,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, "N 2 H"]]:
    """The row pass: dq, and per head lse beside Delta."""
    work, (n, h, d_k) = csr.work, q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_delta = torch.empty((n, 2, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return dq, lse_delta
    scale = _scale(da, q)
    part = dq_part(q, csr)
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _edge_attention_bwd_dq_kernel[(work.piece_row.numel(),)](
        dq,
        lse_delta,
        part,
        da_ptr=da,
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        score_scale=score_scale(d_k),
        scale=scale,
        H=h,
        d_k=d_k,
        IS_MEAN=da.dim() == 1,
        **widths,
        **tile(columns, columns, q.dtype, _TILE),
    )
    join_dq(dq, lse_delta, part, lse=lse, scale=scale, csr=csr)
    return dq, lse_delta


def bwd_dk(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    lse_delta: Float[Tensor, "N 2 H"],
    csr_t: Csr,
) -> Float[Tensor, "N H d_k"]:
    """The column pass."""
    work, (n, h, d_k) = csr_t.work, q.shape
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if n == 0:
        return dk
    part = torch.empty((work.n_split, h * d_k), dtype=torch.float32, device=q.device)
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _edge_attention_bwd_dk_kernel[(work.piece_row.numel(),)](
        dk,
        part,
        da,
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse_delta,
        col_ptr=csr_t.col,
        slot_ptr=csr_t.slot,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        stride_lse_n=lse_delta.stride(0),
        score_scale=score_scale(d_k),
        scale=_scale(da, q),
        H=h,
        d_k=d_k,
        IS_MEAN=da.dim() == 1,
        **widths,
        **tile(columns, columns, q.dtype, _TILE, scalars=widths["BLOCK_H"]),
    )
    join_dk(dk, part, csr=csr_t)
    return dk


def _scale(da: Tensor, q: Tensor) -> float:
    """What a score's gradient is multiplied by; `da` of the mean counts each head 1/H."""
    h, d_k = q.shape[1:]
    return 1 / (math.sqrt(d_k) * (h if da.dim() == 1 else 1))
