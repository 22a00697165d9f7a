"""The scores of a row: a sweep over the keys of a piece, and what normalises them."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import triton
import triton.language as tl

from grand_fast.kernels.gpu.attention.weighting import (
    LOG2E,
    in_base_2,
    load_edge_weight,
    load_slots,
    scores,
    unit,
    unnormalised,
)
from grand_fast.kernels.gpu.sums import head_dot
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_heads,
    gather_per_head,
    heads_of,
    load_per_head,
)


@triton.jit
def online(m, l, s, mask_e, weighting, top):  # noqa: E741
    """One turn of the online sum of one group of heads.

    m, l [BLOCK_G, BLOCK_H], s [BLOCK_E, BLOCK_G, BLOCK_H]. Returns the new m and l, what old sums
    are multiplied by, and p. In a softmax m is the shift in base 2, the largest score;
    squareplus counts from `top` instead, and m stays 0.
    """
    if weighting.top is None:
        s = tl.where(mask_e[:, :, None], s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, 0) * (unit(weighting) * LOG2E))
        fade = tl.exp2(m - largest)
        p = unnormalised(s, largest, weighting, top)
        return largest, l * fade + tl.sum(p, 0), fade, p
    else:
        p = tl.where(mask_e[:, :, None], unnormalised(s, m, weighting, top), 0.0)
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
def sweep_scores(
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
    """m and l of the scores of a piece, see `online`, N_H of [BLOCK_H]."""
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
def norm_of(m, l, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):  # noqa: E741
    """Shift in base 2 and 1 / Σ p of m and l, N_H of [BLOCK_H] each.

    A padded head has the shift +∞ and 0: it gets no weight, whatever its scores are.
    """
    shift = ()
    inverse = ()
    for g in tl.static_range(N_H):
        is_head = heads_of(g, BLOCK_H) < H
        shift = shift + (tl.where(is_head, m[g], float("inf")),)
        inverse = inverse + (tl.where(is_head, 1.0 / l[g], 0.0),)
    return shift, inverse


@triton.jit
def store_norm(norm_ptr, shift, inverse, weighting, H: tl.constexpr, BLOCK_H: tl.constexpr,
               N_H: tl.constexpr):  # fmt: skip
    """Write a row of `norm`. Its shift is in base e: rounded, so that 1 / Σ p becomes another."""
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        natural = shift[g]
        total = inverse[g]
        if weighting.top is None:
            is_empty = total == float("inf")
            natural = tl.where(is_empty, float("-inf"), shift[g] / LOG2E)
            # as whoever loads it has it
            total *= tl.exp2(tl.where(is_empty, 0.0, in_base_2(natural, weighting) - shift[g]))
        tl.store(norm_ptr + offs_h, natural, mask=offs_h < H)
        tl.store(norm_ptr + H + offs_h, total, mask=offs_h < H)


@triton.jit
def load_norm(norm_ptr, weighting, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):
    """A row of `norm`, as `norm_of` gives it."""
    natural = load_per_head(norm_ptr, H, BLOCK_H, N_H, float("inf"))
    inverse = load_per_head(norm_ptr + H, H, BLOCK_H, N_H, 0.0)
    shift = ()
    for g in tl.static_range(N_H):
        shift = shift + (in_base_2(natural[g], weighting),)
    return shift, inverse


@triton.jit
def gather_norm(
    norm_ptr,
    index,
    mask_e,
    weighting,
    stride: tl.constexpr,
    IS_IN_BASE_2: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    N_H: tl.constexpr,
):
    """Rows of a table that begin as those of `norm`: shift and 1 / Σ p, N_H each.

    [BLOCK_E, BLOCK_G, BLOCK_H]; `weight` is 0 where there is no edge.
    """
    rows = norm_ptr + index[:, :, None].to(tl.int64) * stride
    loaded = gather_per_head(rows, 0, mask_e, float("inf"), H, BLOCK_H, N_H)
    inverse = gather_per_head(rows, H, mask_e, 0.0, H, BLOCK_H, N_H)
    shift = ()
    for g in tl.static_range(N_H):
        shift_g = loaded[g]
        if not IS_IN_BASE_2:
            shift_g = in_base_2(shift_g, weighting)
        shift = shift + (shift_g,)
    return shift, inverse
