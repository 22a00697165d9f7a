"""Sweeps of the forward of `attention_diffusion` and `attention_product` over a piece's edges."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,var-annotated"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from grand_fast.kernels.gpu.attention.normalizer import gather_norm
from grand_fast.kernels.gpu.attention.online_softmax import (
    join_groups,
    join_heads,
    no_scores,
    online,
    online_heads,
)
from grand_fast.kernels.gpu.attention.scores import edge_scores, weight, weights
from grand_fast.kernels.gpu.sums import (
    add_weighted,
    by_head,
    join_lanes,
    rounded,
    scaled,
    times_heads,
    zeros,
)
from grand_fast.kernels.gpu.tiles import (
    add_edge_rows,
    edge_offsets,
    gather_rows,
    heads_of,
    load_columns,
    load_slots,
    turn_columns,
)


@triton.jit
def gather_both(
    k_ptr, field, j, mask_e, stride_k_n: tl.constexpr, IS_ABSORBED: tl.constexpr,
    sizes: tl.constexpr,
):  # fmt: skip
    """Rows of k and x; absorbed, they are the same."""
    k = gather_rows("heads", k_ptr, j, mask_e, stride_k_n, sizes)
    if IS_ABSORBED:
        x = k
    else:
        x = gather_rows("values", field.x, j, mask_e, field.stride_x_n, sizes)
    return k, x


@triton.jit
def weighted_sum(
    q,
    shift,
    inverse,
    norm_ptr,
    k_ptr,
    field,
    weighting,
    top,
    view,
    beg,
    count,
    stride_k_n: tl.constexpr,
    IS_ABSORBED: tl.constexpr,
    sizes: tl.constexpr,
):
    """Σ w x over a piece, N_D of [BLOCK_D].

    shift, inverse: of the row, as `norm_of` gives them; or (), and each edge finds its sender's.
    """
    offs_e = edge_offsets(sizes)
    groups = zeros(sizes.N_D, sizes.BLOCK_D, sizes)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j = load_columns(view, beg, e + offs_e, count)
        k, x = gather_both(k_ptr, field, j, mask_e, stride_k_n, IS_ABSORBED, sizes)
        slot = load_slots(view, beg, e + offs_e, mask_e)
        s = edge_scores(k, q, slot, mask_e, weighting, sizes)[2]
        shift_e, inverse_e = shift, inverse
        if len(shift) == 0:
            shift_e, inverse_e, _ = gather_norm(norm_ptr, j, mask_e, weighting, False, sizes)
        a = weight(s[0], shift_e[0], inverse_e[0], weighting, top)  # [BLOCK_E, BLOCK_G, BLOCK_H]
        for g in tl.static_range(1, sizes.N_H):
            a += weight(s[g], shift_e[g], inverse_e[g], weighting, top)
        w = tl.where(mask_e, tl.sum(a, 2), 0.0)
        groups = add_weighted(groups, (w[:, :, None],), x)
    return scaled(join_lanes(groups), 1 / sizes.H)


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
    field,
    weighting,
    top,
    view,
    beg,
    count,
    stride_k_n: tl.constexpr,
    IS_ABSORBED: tl.constexpr,
    sizes: tl.constexpr,
):
    """Σ w x of a row by online softmax, gathering k and x once; and m, l of its scores.

    A lane holds the weight of one head of a group, that of its columns of k. It exchanges it with
    the lanes of the others: accumulator r of a lane with head h belongs to head h ^ r.
    """
    offs_e = edge_offsets(sizes)
    m, l = no_scores(weighting, sizes)  # noqa: E741
    groups = ()
    for _ in tl.static_range(sizes.N_H * sizes.BLOCK_H * sizes.N_D):
        groups = groups + (
            tl.zeros([sizes.BLOCK_G, sizes.BLOCK_H, sizes.BLOCK_D // sizes.BLOCK_H], tl.float32),
        )
    left = count - offs_e
    j_next = tl.load(view.col + beg + offs_e, mask=left > 0, other=0)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e < left
        j = j_next
        k, x = gather_both(k_ptr, field, j, mask_e, stride_k_n, IS_ABSORBED, sizes)
        behind = e + sizes.BLOCK_E * sizes.BLOCK_G
        j_next = tl.load(view.col + beg + (behind + offs_e), mask=behind < left, other=0)
        slot = load_slots(view, beg, e + offs_e, mask_e)
        s = edge_scores(k, q, slot, mask_e, weighting, sizes)[2]
        new = ()
        new_m = ()
        new_l = ()
        for g in tl.static_range(sizes.N_H):
            m_g, l_g, fade, p = online(m[g], l[g], s[g], mask_e, weighting, top)
            new_m = new_m + (m_g,)
            new_l = new_l + (l_g,)
            ps = (p,)
            fades = (fade,)
            for r in tl.static_range(sizes.BLOCK_H):
                if r > 0:
                    ps = with_next_heads(ps)
                    if weighting.top is None:
                        fades = with_next_heads(fades)
                for c in tl.static_range(sizes.N_D):
                    old = groups[(g * sizes.BLOCK_H + r) * sizes.N_D + c]
                    if weighting.top is None:
                        old *= fades[r][:, :, None]
                    px = tl.sum(ps[r][:, :, :, None] * by_head(x[c], sizes.BLOCK_H), 0)
                    new = new + (old + px,)
        groups, m, l = new, new_m, new_l  # noqa: E741
    ax = ()
    for _ in tl.static_range(sizes.N_D):
        ax = ax + (
            tl.zeros([sizes.BLOCK_G, sizes.BLOCK_H, sizes.BLOCK_D // sizes.BLOCK_H], tl.float32),
        )
    largest = ()
    total = ()
    for g in tl.static_range(sizes.N_H):
        m_g, l_g, fade = join_groups(m[g], l[g])
        largest = largest + (m_g,)
        total = total + (l_g,)
        _, is_head = heads_of(g, sizes)
        inverse = tl.where(is_head & (l_g != 0.0), 1.0 / (l_g * sizes.H), 0.0)
        share = fade * inverse[None, :]
        shares = (share,)
        for r in tl.static_range(sizes.BLOCK_H):
            if r > 0:
                shares = with_next_heads(shares)
            new = ()
            for c in tl.static_range(sizes.N_D):
                new = new + (
                    ax[c] + groups[(g * sizes.BLOCK_H + r) * sizes.N_D + c] * shares[r][:, :, None],
                )
            ax = new
    flat = ()
    for c in tl.static_range(sizes.N_D):
        part = tl.reshape(ax[c], [sizes.BLOCK_G, sizes.BLOCK_D])
        if sizes.N_H * sizes.BLOCK_H == 1:
            part = rounded(part)  # else the last addition is over by now
        flat = flat + (tl.sum(part, 0),)
    return flat, largest, total


class Tables(NamedTuple):
    """What an edge reads beside its weight's `norm`, as one argument of kernels."""

    k: Tensor
    v: Tensor
    edge_value: Tensor | None
    stride_k_n: tl.constexpr
    stride_v_n: tl.constexpr


@triton.jit
def sweep_values(
    q, shift, inverse, norm_ptr, tables, weighting, top, view, beg, count, IS_ONLINE: tl.constexpr,
    sizes: tl.constexpr, x_sizes: tl.constexpr,
):  # fmt: skip
    """Σ a v over a piece, N_A of [BLOCK_A] of `x_sizes`; and m, l of its scores if not yet known.

    shift, inverse: of the row, as `norm_of` gives them; or (), and each edge finds its sender's.
    """
    offs_e = edge_offsets(sizes)
    m, l = no_scores(weighting, sizes)  # noqa: E741
    sums = zeros(x_sizes.N_A, x_sizes.BLOCK_A, x_sizes)
    j_next = load_columns(view, beg, offs_e, count)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j, j_next = turn_columns(j_next, view, beg, e, offs_e, count, True, sizes)
        k = gather_rows("heads", tables.k, j, mask_e, tables.stride_k_n, sizes)
        v = gather_rows("heads", tables.v, j, mask_e, tables.stride_v_n, x_sizes)
        slot = load_slots(view, beg, e + offs_e, mask_e)
        k, q = add_edge_rows(k, q, weighting.edge_key, slot, mask_e, view, sizes)
        v, q = add_edge_rows(v, q, tables.edge_value, slot, mask_e, view, x_sizes)
        s = edge_scores(k, q, slot, mask_e, weighting, sizes)[2]
        if IS_ONLINE:
            m, l, fades, p = online_heads(m, l, s, mask_e, weighting, top)  # noqa: E741
            if weighting.top is None:
                sums = times_heads(sums, fades)
        else:
            shift_e, inverse_e = shift, inverse
            if len(shift) == 0:
                shift_e, inverse_e, _ = gather_norm(norm_ptr, j, mask_e, weighting, False, sizes)
            p = weights(s, shift_e, inverse_e, weighting, top)
        sums = add_weighted(sums, p, v)
    largest = ()
    total = ()
    if IS_ONLINE:
        largest, total, fades = join_heads(m, l)
        shares = ()
        for g in tl.static_range(sizes.N_H):
            inverse_g = tl.where(total[g] != 0.0, 1.0 / total[g], 0.0)
            shares = shares + (fades[g] * inverse_g[None, :],)
        groups = times_heads(sums, shares)
        sums = ()
        for c in tl.static_range(x_sizes.N_A):
            sums = sums + (rounded(groups[c]),)
    return join_lanes(sums), largest, total
