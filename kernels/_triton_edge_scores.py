"""The softmax of a row's scores: a sweep over the keys of a piece, and lse of split rows."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Csr
from grand_fast.kernels._triton_tiles import (
    by_head,
    edge_offsets,
    gather,
    head_columns,
    head_widths,
    load_piece,
    tile,
)

SWEEP_TILE = 1024  # elements of a tile of keys per warp: a key is used at once, only m and l stay
# Kernels scale their scores by it: 2ˢ is one instruction, eˢ five.
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def sweep_lse(
    q,
    k_ptr,
    col_ptr,
    beg,
    count,
    offs_a,
    mask_a,
    stride_k_n: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Maximum m of the scores of a piece and l = Σ 2^(s − m), each [BLOCK_H]; q comes scaled."""
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    # Finite, so that a group without edges gives exp(m − m) = 1 and not NaN.
    m = tl.full([BLOCK_G, BLOCK_H], -1e38, tl.float32)
    l = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)  # noqa: E741
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = gather(k_ptr, j, mask_e, offs_a, mask_a, stride_k_n)
        s = tl.where(mask_e[:, :, None], tl.sum(by_head(k * q, BLOCK_H), 3), float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        l = l * tl.exp2(m - top) + tl.sum(tl.exp2(s - top[None, :, :]), 0)  # noqa: E741
        m = top
    top = tl.max(m, 0)
    return top, tl.sum(l * tl.exp2(m - top[None, :]), 0)


@triton.jit
def log_sum(m, l):  # noqa: E741
    """lse in base e, of scores in base 2; −∞ in a row without edges, and NaN stays NaN."""
    return tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)


@triton.jit
def weight(s, lse):
    """exp(s − lse) of scores in base 2 and lse in base e."""
    return tl.exp2(s - lse * LOG2E)


@triton.jit
def _edge_attention_fwd_lse_kernel(
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
    row, beg, count = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    q = tl.load(q_ptr + row * stride_q_n + offs_a, mask=mask_a, other=0.0).to(tl.float32) * scale
    m, l = sweep_lse(  # noqa: E741
        q, k_ptr, col_ptr, beg, count, offs_a, mask_a, stride_k_n, BLOCK_H, BLOCK_E, BLOCK_G
    )
    tl.store(part_m_ptr + pid_p * H + offs_h, m, mask=offs_h < H)
    tl.store(part_l_ptr + pid_p * H + offs_h, l, mask=offs_h < H)


@triton.jit
def _edge_attention_fwd_lse_join_kernel(
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
        l = l * tl.exp2(m - top) + l_p * tl.exp2(m_p - top)  # noqa: E741
        m = top
    tl.store(lse_ptr + row * H + offs_h, log_sum(m, l), mask=mask_h)


def score_scale(d_k: int) -> float:
    """Factor of <q, k> that gives scores in base 2."""
    return LOG2E.value / math.sqrt(d_k)  # type: ignore[no-any-return]


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
    _edge_attention_fwd_lse_kernel[(work.n_split,)](
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
        scale=score_scale(d_k),
        H=h,
        d_k=d_k,
        **widths,
        **tile(columns, columns, q.dtype, SWEEP_TILE),
    )
    _edge_attention_fwd_lse_join_kernel[(work.split_row.numel(),)](
        lse,
        part_m,
        part_l,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        BLOCK_H=widths["BLOCK_H"],
        num_warps=1,
    )
