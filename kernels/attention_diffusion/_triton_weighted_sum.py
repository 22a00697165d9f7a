"""Sweeps of the forward of `attention_diffusion` over the edges of a piece."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import triton
import triton.language as tl

from grand_fast.kernels._triton_edge_scores import weight
from grand_fast.kernels._triton_tiles import by_head, edge_offsets, gather


@triton.jit
def weighted_sum(
    q,
    lse,
    k_ptr,
    x_ptr,
    col_ptr,
    beg,
    count,
    offs_a,
    mask_a,
    offs_d,
    mask_d,
    stride_k_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Σ w x over a piece, [BLOCK_D]; lse [BLOCK_H] is known, +∞ for a padded head."""
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    groups = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = gather(k_ptr, j, mask_e, offs_a, mask_a, stride_k_n)
        x = gather(x_ptr, j, mask_e, offs_d, mask_d, stride_x_n)
        p = weight(tl.sum(by_head(k * q, BLOCK_H), 3), lse)  # [BLOCK_E, BLOCK_G, BLOCK_H]
        w = tl.where(mask_e, tl.sum(p, 2), 0.0)
        groups += tl.sum(w[:, :, None] * x, 0)
    return tl.sum(groups, 0) / H
