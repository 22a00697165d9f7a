"""Rows of several pieces: the kernels that join partial sums, and their launchers.

One program per split row adds the partial sums of its pieces in order, then writes the row as the
program of a whole row would. Split rows are few, so these kernels are short and plain.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Add, Csr
from grand_fast.kernels._triton import (
    head_columns,
    head_widths,
    load_piece,
    log_sum,
    store_diffusion,
    store_dq,
    sweep_lse,
    tile,
)

_TILE = 1024  # elements of a gathered tile per warp; only m and l stay next to it


@triton.jit
def _join_pieces(part_ptr, first, last, offs, mask, stride: tl.constexpr):
    """Σ of the partial sums of pieces `first ≤ piece < last`, in order: [columns]."""
    offs_p = tl.arange(0, 8)  # pieces in flight
    total = tl.zeros(offs.shape, tl.float32)
    for p in range(first, last, 8):
        mask_p = p + offs_p < last
        at = part_ptr + (p + offs_p)[:, None] * stride + offs
        total += tl.sum(tl.load(at, mask=mask_p[:, None] & mask, other=0.0), 0)
    return total


@triton.jit
def _join_diffusion_kernel(
    f_ptr,
    part_ptr,
    x_ptr,
    alpha_ptr,
    beta_ptr,
    x0_ptr,
    split_row_ptr,
    split_ptr_ptr,
    stride_f_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_x0_n: tl.constexpr,
    d: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    ax = _join_pieces(part_ptr, first, last, offs_d, offs_d < d, d)
    store_diffusion(
        f_ptr, ax, x_ptr, alpha_ptr, beta_ptr, x0_ptr, row, stride_f_n, stride_x_n,
        stride_x0_n, d, HAS_SOURCE, IS_SCALED, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _piece_lse_kernel(
    part_m_ptr,
    part_l_ptr,
    q_ptr,
    k_ptr,
    col_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, end = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    q = tl.load(q_ptr + row * stride_q_n + offs_a, mask=mask_a, other=0.0).to(tl.float32) * scale
    m, l = sweep_lse(  # noqa: E741
        q, k_ptr, col_ptr, beg, end, offs_a, mask_a, stride_k_n, BLOCK_H, BLOCK_E, BLOCK_G
    )
    tl.store(part_m_ptr + pid_p * H + offs_h, m, mask=offs_h < H)
    tl.store(part_l_ptr + pid_p * H + offs_h, l, mask=offs_h < H)


@triton.jit
def _join_lse_kernel(
    lse_ptr,
    part_m_ptr,
    part_l_ptr,
    split_row_ptr,
    split_ptr_ptr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    m = tl.load(part_m_ptr + first * H + offs_h, mask=mask_h, other=0.0)
    l = tl.load(part_l_ptr + first * H + offs_h, mask=mask_h, other=1.0)  # noqa: E741
    for p in range(first + 1, last):
        m_p = tl.load(part_m_ptr + p * H + offs_h, mask=mask_h, other=0.0)
        l_p = tl.load(part_l_ptr + p * H + offs_h, mask=mask_h, other=0.0)
        top = tl.maximum(m, m_p)
        l = l * tl.exp(m - top) + l_p * tl.exp(m_p - top)  # noqa: E741
        m = top
    tl.store(lse_ptr + row * H + offs_h, log_sum(m, l), mask=mask_h)


@triton.jit
def store_dq_part(
    part_ptr,
    sum_p,
    sum_pt,
    sum_pk,
    sum_ptk,
    t0,
    pid_p,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums of one piece, a row of `part`: Σ p k | Σ p t k | Σ p | Σ p t | t0."""
    offs_a = tl.arange(0, BLOCK_H * BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H) + 2 * BLOCK_H * BLOCK_K
    at = part_ptr + pid_p * (BLOCK_H * (2 * BLOCK_K + 3))
    tl.store(at + offs_a, sum_pk)
    tl.store(at + offs_a + BLOCK_H * BLOCK_K, sum_ptk)
    tl.store(at + offs_h, sum_p)
    tl.store(at + offs_h + BLOCK_H, sum_pt)
    tl.store(at + offs_h + 2 * BLOCK_H, tl.zeros([BLOCK_H], tl.float32) + t0)


@triton.jit
def _join_dq_kernel(
    dq_ptr,
    delta_ptr,
    part_ptr,
    split_row_ptr,
    split_ptr_ptr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    width: tl.constexpr = BLOCK_H * (2 * BLOCK_K + 3)
    offs_a = tl.arange(0, BLOCK_H * BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H) + 2 * BLOCK_H * BLOCK_K
    sum_pk = _join_pieces(part_ptr, first, last, offs_a, offs_a < width, width)
    sum_ptk = _join_pieces(part_ptr + BLOCK_H * BLOCK_K, first, last, offs_a, offs_a < width, width)
    sum_p = _join_pieces(part_ptr, first, last, offs_h, offs_h < width, width)
    sum_pt = _join_pieces(part_ptr + BLOCK_H, first, last, offs_h, offs_h < width, width)
    t0 = tl.load(part_ptr + first * width + 2 * BLOCK_H + offs_h)  # alike in all pieces of a row
    store_dq(
        dq_ptr, delta_ptr, sum_p, sum_pt, sum_pk, sum_ptk, t0, row, scale, H, d_k,
        BLOCK_H, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _join_dk_kernel(
    dk_ptr,
    part_ptr,
    split_row_ptr,
    split_ptr_ptr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    dk = _join_pieces(part_ptr, first, last, offs_a, mask_a, H * d_k)
    tl.store(dk_ptr + row * (H * d_k) + offs_a, dk.to(dk_ptr.dtype.element_ty), mask=mask_a)


def join_diffusion(
    f: Float[Tensor, "N d"],
    part: Float[Tensor, "P d"],
    x: Float[Tensor, "N d"],
    *,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    csr: Csr,
    is_scaled: bool,
) -> None:
    """Write the rows of `f` that have several pieces, from their partial sums `part`."""
    work, d = csr.work, x.shape[1]
    if work.n_split == 0:
        return
    block_d = triton.next_power_of_2(d)
    _join_diffusion_kernel[(work.split_row.numel(),)](
        f,
        part,
        x,
        alpha_ptr=alpha,
        beta_ptr=beta,
        x0_ptr=x0,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        stride_f_n=f.stride(0),
        stride_x_n=x.stride(0),
        stride_x0_n=0 if x0 is None else x0.stride(0),
        d=d,
        HAS_SOURCE=x0 is not None,
        IS_SCALED=is_scaled,
        BLOCK_D=block_d,
        num_warps=tile(block_d, block_d, torch.float32, _TILE)["num_warps"],
    )


def split_lse(
    lse: Float[Tensor, "N H"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    csr: Csr,
) -> None:
    """Write the rows of `lse` that have several pieces."""
    work, (_, h, d_k) = csr.work, q.shape
    if work.n_split == 0:
        return
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    part_m = torch.empty((work.n_split, h), dtype=torch.float32, device=q.device)
    part_l = torch.empty((work.n_split, h), dtype=torch.float32, device=q.device)
    _piece_lse_kernel[(work.n_split,)](
        part_m,
        part_l,
        q,
        k_ptr=k,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=1 / math.sqrt(d_k),
        H=h,
        d_k=d_k,
        **widths,
        **tile(columns, columns, q.dtype, _TILE),
    )
    _join_lse_kernel[(work.split_row.numel(),)](
        lse,
        part_m,
        part_l,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        BLOCK_H=widths["BLOCK_H"],
        num_warps=1,
    )


def join_dq(
    dq: Float[Tensor, "N H d_k"],
    delta: Float[Tensor, "N H"],
    part: Float[Tensor, "P W"],
    *,
    scale: float,
    csr: Csr,
) -> None:
    """Write the rows of `dq` and `delta` that have several pieces, from their sums `part`."""
    work, (_, h, d_k) = csr.work, dq.shape
    if work.n_split == 0:
        return
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _join_dq_kernel[(work.split_row.numel(),)](
        dq,
        delta,
        part,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        scale=scale,
        H=h,
        d_k=d_k,
        **widths,
        num_warps=tile(columns, columns, torch.float32, _TILE)["num_warps"],
    )


def join_dk(dk: Float[Tensor, "N H d_k"], part: Float[Tensor, "P d_att"], *, csr: Csr) -> None:
    """Write the rows of `dk` that have several pieces, from their sums `part`."""
    work, (_, h, d_k) = csr.work, dk.shape
    if work.n_split == 0:
        return
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _join_dk_kernel[(work.split_row.numel(),)](
        dk,
        part,
        work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        d_k=d_k,
        **widths,
        num_warps=tile(columns, columns, torch.float32, _TILE)["num_warps"],
    )


def dq_part(q: Float[Tensor, "N H d_k"], csr: Csr) -> Float[Tensor, "P W"]:
    """Memory for the sums of the pieces of split rows, as `store_dq_part` lays them out."""
    widths = head_widths(q.shape[1], q.shape[2])
    columns = widths["BLOCK_H"] * (2 * widths["BLOCK_K"] + 3)
    return torch.empty((csr.work.n_split, columns), dtype=torch.float32, device=q.device)


def add_in_place(f: Tensor, add: Add) -> None:
    """`f += Σ_s c_s y_s`, in passes of their own, each rounded to the dtype of `f`."""
    for scale, y in add:
        f.add_(y, alpha=scale)
