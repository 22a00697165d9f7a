"""Backward of `attention_diffusion`: a row pass for dq and Delta, a column pass for dk and dx."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Add, Csr
from grand_fast.kernels._triton_attention_backward import (
    dq_part,
    join_dk,
    join_dq,
    store_dq,
    store_dq_part,
)
from grand_fast.kernels._triton_diffusion import dense, join_diffusion, store_diffusion
from grand_fast.kernels._triton_edge_scores import score_scale, weight
from grand_fast.kernels._triton_tiles import (
    by_head,
    edge_dot,
    edge_offsets,
    gather,
    head_columns,
    load_piece,
    tiles,
)

_TILE = 512  # elements of a gathered tile per warp: two tiles, and two or three accumulators


@triton.jit(do_not_specialize=["n_split"])
def _attention_diffusion_bwd_dq_kernel(
    dq_ptr,
    lse_delta_ptr,
    part_ptr,
    df_ptr,
    x_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    alpha_ptr,
    col_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_df_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    score_scale,
    scale,
    d: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    q = tl.load(q_ptr + row * stride_q_n + offs_a, mask=mask_a, other=0.0).to(tl.float32)
    q = tl.reshape(q * score_scale, [BLOCK_H, BLOCK_K])
    lse = tl.load(lse_ptr + row * H + offs_h, mask=mask_h, other=float("inf"))
    g = tl.load(df_ptr + row * stride_df_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    g *= tl.load(alpha_ptr + offs_d, mask=mask_d, other=0.0)
    x_i = tl.load(x_ptr + row * stride_x_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # After some diffusion neighbours are alike: t − t0 is small, and keeps its digits in the sums.
    t0 = tl.sum(g * x_i, 0)
    p_groups = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    pt_groups = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    pk_groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    ptk_groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = by_head(gather(k_ptr, j, mask_e, offs_a, mask_a, stride_k_n), BLOCK_H)
        x = gather(x_ptr, j, mask_e, offs_d, mask_d, stride_x_n)
        p = tl.where(mask_e[:, :, None], weight(tl.sum(k * q, 3), lse), 0.0)
        pt = p * (edge_dot(x * g, BLOCK_H, BLOCK_K) - t0)
        p_groups += tl.sum(p, 0)
        pt_groups += tl.sum(pt, 0)
        pk_groups += tl.sum(p[:, :, :, None] * k, 0)
        ptk_groups += tl.sum(pt[:, :, :, None] * k, 0)
    sum_p = tl.sum(p_groups, 0)
    sum_pt = tl.sum(pt_groups, 0)
    sum_pk = tl.reshape(tl.sum(pk_groups, 0), [BLOCK_H * BLOCK_K])
    sum_ptk = tl.reshape(tl.sum(ptk_groups, 0), [BLOCK_H * BLOCK_K])
    if pid_p < n_split:
        store_dq_part(part_ptr, sum_p, sum_pt, sum_pk, sum_ptk, t0, pid_p, BLOCK_H, BLOCK_K)
    else:
        store_dq(
            dq_ptr, lse_delta_ptr, sum_p, sum_pt, sum_pk, sum_ptk, t0, lse, row, scale, H, d_k,
            BLOCK_H, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_split"])
def _attention_diffusion_bwd_dk_kernel(
    dx_ptr,
    dk_ptr,
    part_x_ptr,
    part_k_ptr,
    df_ptr,
    x_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    alpha_ptr,
    add,
    col_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_dx_n: tl.constexpr,
    stride_df_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    stride_lse_n: tl.constexpr,
    score_scale,
    scale,
    d: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    HAS_DK: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    k = tl.load(k_ptr + row * stride_k_n + offs_a, mask=mask_a, other=0.0).to(tl.float32)
    k = tl.reshape(k * score_scale, [BLOCK_H, BLOCK_K])
    if HAS_DK:
        x = tl.load(x_ptr + row * stride_x_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        x *= tl.load(alpha_ptr + offs_d, mask=mask_d, other=0.0)
        k_groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    x_groups = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        mask_eh = mask_e[:, :, None] & (offs_h < H)
        i = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        q = by_head(gather(q_ptr, i, mask_e, offs_a, mask_a, stride_q_n), BLOCK_H)
        df = gather(df_ptr, i, mask_e, offs_d, mask_d, stride_df_n)
        at = lse_ptr + (i[:, :, None].to(tl.int64) * stride_lse_n + offs_h)
        lse = tl.load(at, mask=mask_eh, other=float("inf"))  # no weight outside
        p = weight(tl.sum(q * k, 3), lse)  # [BLOCK_E, BLOCK_G, BLOCK_H]
        if HAS_DK:
            delta = tl.load(at + H, mask=mask_eh, other=0.0)
            ds = p * (edge_dot(df * x, BLOCK_H, BLOCK_K) - delta)
            k_groups += tl.sum(ds[:, :, :, None] * q, 0)
        w = tl.sum(p, 2)
        x_groups += tl.sum(w[:, :, None] * df, 0)
    ax = tl.sum(x_groups, 0) / H
    if pid_p < n_split:
        tl.store(part_x_ptr + pid_p * d + offs_d, ax, mask=mask_d)
    else:
        store_diffusion(
            dx_ptr, ax, df_ptr, alpha_ptr, alpha_ptr, df_ptr, add, row, stride_dx_n, stride_df_n,
            stride_df_n, d, False, IS_SCALED, BLOCK_D,
        )  # fmt: skip
    if HAS_DK:
        dk = scale * tl.reshape(tl.sum(k_groups, 0), [BLOCK_H * BLOCK_K])
        if pid_p < n_split:
            tl.store(part_k_ptr + pid_p * (H * d_k) + offs_a, dk, mask=mask_a)
        else:
            at_row = dk_ptr + row * (H * d_k) + offs_a
            tl.store(at_row, dk.to(dk_ptr.dtype.element_ty), mask=mask_a)


def bwd_dq(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    lse: Float[Tensor, "N H"],
    alpha: Float[Tensor, " d"],
    csr: Csr,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, "N 2 H"]]:
    """The row pass: dq, and per head lse beside Delta."""
    work, d, (n, h, d_k) = csr.work, x.shape[1], q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_delta = torch.empty((n, 2, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return dq, lse_delta
    scale = 1 / (h * math.sqrt(d_k))
    part = dq_part(q, csr)
    _attention_diffusion_bwd_dq_kernel[(work.piece_row.numel(),)](
        dq,
        lse_delta,
        part,
        df_ptr=df,
        x_ptr=x,
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        alpha_ptr=alpha,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_df_n=df.stride(0),
        stride_x_n=x.stride(0),
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        score_scale=score_scale(d_k),
        scale=scale,
        d=d,
        H=h,
        d_k=d_k,
        **tiles(d, h, d_k, x.dtype, _TILE),
    )
    join_dq(dq, lse_delta, part, lse=lse, scale=scale, csr=csr)
    return dq, lse_delta


def bwd_dk(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    lse: Float[Tensor, "N H"],
    lse_delta: Float[Tensor, "N 2 H"] | None,
    alpha: Float[Tensor, " d"],
    add: Add,
    csr_t: Csr,
    is_scaled: bool,
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N H d_k"] | None]:
    """The column pass: dk if `lse_delta` is given, and dx; without alpha and in float32 at will."""
    work, d, (n, h, d_k) = csr_t.work, x.shape[1], q.shape
    dx = torch.empty(x.shape, dtype=x.dtype if is_scaled else torch.float32, device=x.device)
    dk = part_k = None
    if lse_delta is not None:
        lse = lse_delta
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        part_k = torch.empty((work.n_split, h * d_k), dtype=torch.float32, device=k.device)
    if n == 0:
        return dx, dk
    part_x = torch.empty((work.n_split, d), dtype=torch.float32, device=x.device)
    _attention_diffusion_bwd_dk_kernel[(work.piece_row.numel(),)](
        dx,
        dk,
        part_x,
        part_k_ptr=part_k,
        df_ptr=df,
        x_ptr=x,
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        alpha_ptr=alpha,
        add=dense(add),
        col_ptr=csr_t.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_dx_n=dx.stride(0),
        stride_df_n=df.stride(0),
        stride_x_n=x.stride(0),
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        stride_lse_n=lse.stride(0),
        score_scale=score_scale(d_k),
        scale=1 / (h * math.sqrt(d_k)),
        d=d,
        H=h,
        d_k=d_k,
        HAS_DK=dk is not None,
        IS_SCALED=is_scaled,
        **tiles(d, h, d_k, x.dtype, _TILE, scalars=triton.next_power_of_2(h)),
    )
    join_diffusion(
        dx, part_x, df, alpha=alpha, beta=None, x0=None, add=add, csr=csr_t, is_scaled=is_scaled
    )
    if dk is not None and part_k is not None:
        join_dk(dk, part_k, csr=csr_t)
    return dx, dk
