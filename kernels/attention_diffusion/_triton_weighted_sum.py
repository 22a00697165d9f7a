"""Sweeps of the forward of `attention_diffusion` over the edges of a piece."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import triton
import triton.language as tl

from grand_fast.kernels._triton_edge_scores import log_sum, weight
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


@triton.jit
def swap_heads(p, r: tl.constexpr, BLOCK_H: tl.constexpr):
    """p[e, g, h ^ r] of p [BLOCK_E, BLOCK_G, BLOCK_H].

    Written as a sum over pairs, y ^ (y ^ z) = z, which compiles to one shuffle; a gather would go
    through shared memory.
    """
    y = p.to(tl.int32, bitcast=True)
    for bit in tl.static_range(5):
        if (r >> bit) & 1:
            y = tl.reshape(y, [p.shape[0], p.shape[1], BLOCK_H >> (bit + 1), 2, 1 << bit])
            y = y ^ tl.xor_sum(y, 3, keep_dims=True)
            y = tl.reshape(y, [p.shape[0], p.shape[1], BLOCK_H])
    return y.to(tl.float32, bitcast=True)


@triton.jit
def sweep_once(
    q,
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
    """Σ w x of a row [BLOCK_D] and its lse [BLOCK_H] by online softmax, gathering k and x once.

    A lane holds the weight of one head, that of its columns of k. It exchanges it with the lanes of
    the others: accumulator r of a lane with head h belongs to head h ^ r.
    """
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    # Finite, so that a group without edges gives exp(m − m) = 1 and not NaN.
    m = tl.full([BLOCK_G, BLOCK_H], -1e38, tl.float32)
    l = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)  # noqa: E741
    groups = ()
    for _ in tl.static_range(BLOCK_H):
        groups = groups + (tl.zeros([BLOCK_G, BLOCK_H, BLOCK_D // BLOCK_H], tl.float32),)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = gather(k_ptr, j, mask_e, offs_a, mask_a, stride_k_n)
        x = by_head(gather(x_ptr, j, mask_e, offs_d, mask_d, stride_x_n), BLOCK_H)
        s = tl.where(mask_e[:, :, None], tl.sum(by_head(k * q, BLOCK_H), 3), float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        fade = tl.exp2(m - top)
        p = tl.exp2(s - top[None, :, :])  # [BLOCK_E, BLOCK_G, BLOCK_H]
        l = l * fade + tl.sum(p, 0)  # noqa: E741
        new = ()
        for r in tl.static_range(BLOCK_H):
            p_r = swap_heads(p, r, BLOCK_H)
            fade_r = tl.reshape(swap_heads(fade[None, :, :], r, BLOCK_H), [BLOCK_G, BLOCK_H])
            new = new + (groups[r] * fade_r[:, :, None] + tl.sum(p_r[:, :, :, None] * x, 0),)
        groups = new
        m = top
    top = tl.max(m, 0)
    fade = tl.exp2(m - top[None, :])
    l = tl.sum(l * fade, 0)  # noqa: E741
    share = tl.where((tl.arange(0, BLOCK_H) < H) & (l != 0.0), 1.0 / (l * H), 0.0)
    share = fade * share[None, :]
    ax = tl.zeros([BLOCK_H, BLOCK_D // BLOCK_H], tl.float32)
    for r in tl.static_range(BLOCK_H):
        share_r = tl.reshape(swap_heads(share[None, :, :], r, BLOCK_H), [BLOCK_G, BLOCK_H])
        ax += tl.sum(groups[r] * share_r[:, :, None], 0)
    return tl.reshape(ax, [BLOCK_D]), log_sum(top, l)
