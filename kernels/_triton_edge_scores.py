"""The scores of a row: a sweep over the keys of a piece, for lse or the largest."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import triton
import triton.language as tl

from grand_fast.kernels._triton_sums import head_dot
from grand_fast.kernels._triton_tiles import edge_offsets, gather_heads, heads_of
from grand_fast.kernels._triton_weighting import (
    LOG2E,
    load_edge_weight,
    load_slots,
    scores,
    squareplus,
)


@triton.jit
def online(m, l, s, mask_e, weighting, top):  # noqa: E741
    """One turn of the online sum of one group of heads.

    m, l [BLOCK_G, BLOCK_H], s [BLOCK_E, BLOCK_G, BLOCK_H]. Returns the new m and l, what old sums
    are multiplied by, and p. In a softmax m is the largest score, p = 2^(s − m); squareplus counts
    from `top` instead, and m stays 0.
    """
    if weighting.top is None:
        s = tl.where(mask_e[:, :, None], s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, 0))
        fade = tl.exp2(m - largest)
        p = tl.exp2(s - largest[None, :, :])
        return largest, l * fade + tl.sum(p, 0), fade, p
    else:
        p, _ = squareplus(s, top)
        p = tl.where(mask_e[:, :, None], p, 0.0)
        return m, l + tl.sum(p, 0), m, p


@triton.jit
def no_scores(weighting, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):
    """m and l before the first edge."""
    # Finite, so that a group without edges gives exp(m − m) = 1 and not NaN.
    least: tl.constexpr = -1e38 if weighting.top is None else 0.0
    m = ()
    l = ()  # noqa: E741
    for _ in tl.static_range(N_H):
        m = m + (tl.full([BLOCK_G, BLOCK_H], least, tl.float32),)
        l = l + (tl.zeros([BLOCK_G, BLOCK_H], tl.float32),)  # noqa: E741
    return m, l


@triton.jit
def join_groups(m, l):  # noqa: E741
    """m and l of one group of heads over all groups of lanes, each [BLOCK_H], and their shares."""
    largest = tl.max(m, 0)
    fade = tl.exp2(m - largest[None, :])
    return largest, tl.sum(l * fade, 0), fade


@triton.jit
def sweep_lse(
    q,
    k_ptr,
    weighting,
    top,
    col_ptr,
    slot_ptr,
    beg,
    count,
    stride_k_n: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """m and l of the scores of a piece, see `online`, N_H of [BLOCK_H]; q comes scaled."""
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    m, l = no_scores(weighting, BLOCK_G, BLOCK_H, N_H)  # noqa: E741
    j_next = tl.load(col_ptr + beg + offs_e, mask=offs_e < count, other=0)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = j_next
        behind = e + (BLOCK_E * BLOCK_G + offs_e)
        j_next = tl.load(col_ptr + beg + behind, mask=behind < count, other=0)
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        slot = load_slots(slot_ptr, beg, e + offs_e, mask_e)
        w = load_edge_weight(weighting, slot, mask_e)
        s = scores(head_dot(k, q, BLOCK_H, N_H, VEC_A), w, weighting)
        new_m = ()
        new_l = ()
        for g in tl.static_range(N_H):
            m_g, l_g, _, _ = online(m[g], l[g], s[g], mask_e, weighting, top)
            new_m = new_m + (m_g,)
            new_l = new_l + (l_g,)
        m, l = new_m, new_l  # noqa: E741
    largest = ()
    total = ()
    for g in tl.static_range(N_H):
        m_g, l_g, _ = join_groups(m[g], l[g])
        largest = largest + (m_g,)
        total = total + (l_g,)
    return largest, total


@triton.jit
def log_sum(m, l):  # noqa: E741
    """lse in base e, of m in base 2; −∞ in a row without edges, and NaN stays NaN."""
    return tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)


@triton.jit
def row_lse(m, l, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):  # noqa: E741
    """lse of a row, N_H of [BLOCK_H]: +∞ for a padded head, which then gets no weight."""
    lse = ()
    for g in tl.static_range(N_H):
        lse_g = tl.where(heads_of(g, BLOCK_H) < H, log_sum(m[g], l[g]), float("inf"))
        lse = lse + (lse_g,)
    return lse


@triton.jit
def store_lse(lse_ptr, lse, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):
    """Write lse of a row."""
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        tl.store(lse_ptr + offs_h, lse[g], mask=offs_h < H)
