"""The end of a backward pass of the attention: dq and Delta of a row, and rows of several pieces.

With p the weights and t their gradients, dq = scale (Σ p t k − Delta Σ p k), Delta = Σ p t: a piece
leaves four sums, which are plain and join by adding in order.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Csr
from grand_fast.kernels._triton_tiles import head_columns, head_widths, join, row_warps


@triton.jit
def store_dq(
    dq_ptr,
    lse_delta_ptr,
    sum_p,
    sum_pt,
    sum_pk,
    sum_ptk,
    t0,
    lse,
    row,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq = scale (Σ p t k − Delta Σ p k) of one row, and Delta = Σ p t; sums over its edges.

    sum_p, sum_pt [BLOCK_H]; sum_pk, sum_ptk [BLOCK_H · BLOCK_K]. t is counted from t0, which
    cancels in dq. The difference of the two sums can be small against them: that Σ p is only 1 up
    to the rounding of lse would show, so all are divided by it. The column pass gathers lse with
    Delta: a copy of it is stored beside.
    """
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    over_p = tl.where(sum_p > 0.0, 1.0 / sum_p, 0.0)  # a row without edges: dq = 0
    delta = sum_pt * over_p
    difference = tl.reshape(sum_ptk, [BLOCK_H, BLOCK_K]) - delta[:, None] * tl.reshape(
        sum_pk, [BLOCK_H, BLOCK_K]
    )
    dq = tl.reshape(scale * over_p[:, None] * difference, [BLOCK_H * BLOCK_K])
    at = dq_ptr + row * (H * d_k) + offs_a
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=mask_a)
    at_h = lse_delta_ptr + row * (2 * H) + offs_h
    tl.store(at_h, lse, mask=offs_h < H)
    tl.store(at_h + H, delta + t0, mask=offs_h < H)


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
def _edge_attention_bwd_dq_join_kernel(
    dq_ptr,
    lse_delta_ptr,
    part_ptr,
    lse_ptr,
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
    sum_pk = join(part_ptr, first, last, offs_a, offs_a < width, width)
    sum_ptk = join(part_ptr + BLOCK_H * BLOCK_K, first, last, offs_a, offs_a < width, width)
    sum_p = join(part_ptr, first, last, offs_h, offs_h < width, width)
    sum_pt = join(part_ptr + BLOCK_H, first, last, offs_h, offs_h < width, width)
    t0 = tl.load(part_ptr + first * width + 2 * BLOCK_H + offs_h)  # alike in all pieces of a row
    offs_h = tl.arange(0, BLOCK_H)
    lse = tl.load(lse_ptr + row * H + offs_h, mask=offs_h < H, other=0.0)
    store_dq(
        dq_ptr, lse_delta_ptr, sum_p, sum_pt, sum_pk, sum_ptk, t0, lse, row, scale, H, d_k,
        BLOCK_H, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _edge_attention_bwd_dk_join_kernel(
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
    dk = join(part_ptr, first, last, offs_a, mask_a, H * d_k)
    tl.store(dk_ptr + row * (H * d_k) + offs_a, dk.to(dk_ptr.dtype.element_ty), mask=mask_a)


def join_dq(
    dq: Float[Tensor, "N H d_k"],
    lse_delta: Float[Tensor, "N 2 H"],
    part: Float[Tensor, "P W"],
    *,
    lse: Float[Tensor, "N H"],
    scale: float,
    csr: Csr,
) -> None:
    """Write the rows of `dq` and `lse_delta` that have several pieces, from their sums `part`."""
    work, (_, h, d_k) = csr.work, dq.shape
    if work.n_split == 0:
        return
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _edge_attention_bwd_dq_join_kernel[(work.split_row.numel(),)](
        dq,
        lse_delta,
        part,
        lse_ptr=lse,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        scale=scale,
        H=h,
        d_k=d_k,
        **widths,
        num_warps=row_warps(columns),
    )


def join_dk(dk: Float[Tensor, "N H d_k"], part: Float[Tensor, "P d_att"], *, csr: Csr) -> None:
    """Write the rows of `dk` that have several pieces, from their sums `part`."""
    work, (_, h, d_k) = csr.work, dk.shape
    if work.n_split == 0:
        return
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _edge_attention_bwd_dk_join_kernel[(work.split_row.numel(),)](
        dk,
        part,
        work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        d_k=d_k,
        **widths,
        num_warps=row_warps(columns),
    )


def dq_part(q: Float[Tensor, "N H d_k"], csr: Csr) -> Float[Tensor, "P W"]:
    """Memory for the sums of the pieces of split rows, as `store_dq_part` lays them out."""
    widths = head_widths(q.shape[1], q.shape[2])
    columns = widths["BLOCK_H"] * (2 * widths["BLOCK_K"] + 3)
    return torch.empty((csr.work.n_split, columns), dtype=torch.float32, device=q.device)
