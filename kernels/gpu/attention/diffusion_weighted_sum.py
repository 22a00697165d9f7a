"""Sweeps of the forward of `attention_diffusion` over the edges of a piece."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,var-annotated"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import triton
import triton.language as tl

from grand_fast.kernels.gpu.attention.scores import gather_norm, join_groups, no_scores, online
from grand_fast.kernels.gpu.attention.weighting import (
    load_edge_weight,
    load_slots,
    scores,
    weight,
)
from grand_fast.kernels.gpu.sums import (
    add_weighted,
    by_head,
    head_dot,
    join_lanes,
    rounded,
    scaled,
    zeros,
)
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_heads,
    gather_values,
    heads_of,
)


@triton.jit
def weighted_sum(
    q,
    shift,
    inverse,
    norm_ptr,
    k_ptr,
    x_ptr,
    weighting,
    top,
    col_ptr,
    slot_ptr,
    beg,
    count,
    stride_k_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    d: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    IS_ABSORBED: tl.constexpr,
):
    """Σ w x over a piece, N_D of [BLOCK_D].

    shift, inverse: of the row, as `norm_of` gives them; or (), and each edge finds its sender's.
    """
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    groups = zeros(N_D, BLOCK_G, BLOCK_D)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        if IS_ABSORBED:
            x = k  # the same rows
        else:
            x = gather_values(x_ptr, j, mask_e, stride_x_n, d, BLOCK_D, VEC_D, N_D)
        slot = load_slots(slot_ptr, beg, e + offs_e, mask_e)
        edge_w = load_edge_weight(weighting, slot, mask_e)
        s = scores(head_dot(k, q, BLOCK_H, N_H, VEC_A), edge_w, weighting)
        shift_e, inverse_e = shift, inverse
        if len(shift) == 0:
            shift_e, inverse_e = gather_norm(
                norm_ptr, j, mask_e, weighting, 2 * H, False, H, BLOCK_H, N_H
            )
        a = weight(s[0], shift_e[0], inverse_e[0], weighting, top)  # [BLOCK_E, BLOCK_G, BLOCK_H]
        for g in tl.static_range(1, N_H):
            a += weight(s[g], shift_e[g], inverse_e[g], weighting, top)
        w = tl.where(mask_e, tl.sum(a, 2), 0.0)
        groups = add_weighted(groups, (w[:, :, None],), x, 1)
    return scaled(join_lanes(groups), 1 / H)


@triton.jit
def with_next_heads(ps):
    """p[..., h ^ r] for r = 0 … n of p [..., BLOCK_H], given those to n − 1; (p,) is the first.

    Each comes by a shuffle from the one that lacks its lowest bit, so that few wait for each other.
    Written as a sum over pairs, y ^ (y ^ z) = z, which compiles to one shuffle; a gather would go
    through shared memory.
    """
    r: tl.constexpr = len(ps)
    b: tl.constexpr = r & -r
    p = ps[r & (r - 1)]
    y = tl.reshape(p.to(tl.int32, bitcast=True), [p.numel // (2 * b), 2, b])
    y = y ^ tl.xor_sum(y, 1, keep_dims=True)
    return ps + (tl.reshape(y, p.shape).to(tl.float32, bitcast=True),)


@triton.jit
def sweep_once(
    q,
    k_ptr,
    x_ptr,
    weighting,
    top,
    col_ptr,
    slot_ptr,
    beg,
    count,
    stride_k_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    d: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    IS_ABSORBED: tl.constexpr,
):
    """Σ w x of a row by online softmax, gathering k and x once; and m, l of its scores.

    A lane holds the weight of one head of a group, that of its columns of k. It exchanges it with
    the lanes of the others: accumulator r of a lane with head h belongs to head h ^ r.
    """
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    m, l = no_scores(weighting, BLOCK_G, BLOCK_H, N_H)  # noqa: E741
    groups = ()
    for _ in tl.static_range(N_H * BLOCK_H * N_D):
        groups = groups + (tl.zeros([BLOCK_G, BLOCK_H, BLOCK_D // BLOCK_H], tl.float32),)
    left = count - offs_e
    j_next = tl.load(col_ptr + beg + offs_e, mask=left > 0, other=0)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e < left
        j = j_next
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        if IS_ABSORBED:
            x = k  # the same rows
        else:
            x = gather_values(x_ptr, j, mask_e, stride_x_n, d, BLOCK_D, VEC_D, N_D)
        behind = e + BLOCK_E * BLOCK_G
        j_next = tl.load(col_ptr + beg + (behind + offs_e), mask=behind < left, other=0)
        slot = load_slots(slot_ptr, beg, e + offs_e, mask_e)
        edge_w = load_edge_weight(weighting, slot, mask_e)
        s = scores(head_dot(k, q, BLOCK_H, N_H, VEC_A), edge_w, weighting)
        new = ()
        new_m = ()
        new_l = ()
        for g in tl.static_range(N_H):
            m_g, l_g, fade, p = online(m[g], l[g], s[g], mask_e, weighting, top)
            new_m = new_m + (m_g,)
            new_l = new_l + (l_g,)
            ps = (p,)
            fades = (fade,)
            for r in tl.static_range(BLOCK_H):
                if r > 0:
                    ps = with_next_heads(ps)
                    if weighting.top is None:
                        fades = with_next_heads(fades)
                for c in tl.static_range(N_D):
                    old = groups[(g * BLOCK_H + r) * N_D + c]
                    if weighting.top is None:
                        old *= fades[r][:, :, None]
                    px = tl.sum(ps[r][:, :, :, None] * by_head(x[c], BLOCK_H), 0)
                    new = new + (old + px,)
        groups, m, l = new, new_m, new_l  # noqa: E741
    ax = ()
    for _ in tl.static_range(N_D):
        ax = ax + (tl.zeros([BLOCK_G, BLOCK_H, BLOCK_D // BLOCK_H], tl.float32),)
    largest = ()
    total = ()
    for g in tl.static_range(N_H):
        m_g, l_g, fade = join_groups(m[g], l[g])
        largest = largest + (m_g,)
        total = total + (l_g,)
        is_head = (heads_of(g, BLOCK_H) < H) & (l_g != 0.0)
        share = fade * tl.where(is_head, 1.0 / (l_g * H), 0.0)[None, :]
        shares = (share,)
        for r in tl.static_range(BLOCK_H):
            if r > 0:
                shares = with_next_heads(shares)
            new = ()
            for c in tl.static_range(N_D):
                new = new + (ax[c] + groups[(g * BLOCK_H + r) * N_D + c] * shares[r][:, :, None],)
            ax = new
    flat = ()
    for c in tl.static_range(N_D):
        part = tl.reshape(ax[c], [BLOCK_G, BLOCK_D])
        if N_H * BLOCK_H == 1:
            part = rounded(part)  # else the last addition is over by now
        flat = flat + (tl.sum(part, 0),)
    return flat, largest, total
