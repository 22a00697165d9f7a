"""The pass of the backward over the rows whose edges are normalised: dq and Delta; `backward.py`.

With p the weights before they are divided by their sum, t their gradients, and c = ρ w φ'(u) of
each edge, dq = scale (Σ c p t k − Delta Σ c p k) / Σ p, Delta = Σ p t / Σ p: a piece leaves four
sums, which are plain and join by adding in order.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.normalizer import load_norm
from grand_fast.kernels.gpu.attention.scores import (
    KernelWeighting,
    edge_scores,
    load_top,
    past_function,
    past_normalizer,
    unnormalised,
    weights,
)
from grand_fast.kernels.gpu.attention.weight_gradient import (
    Product,
    add_values,
    backward_sizes,
    backward_view,
    no_values,
    state_arguments,
    store_values,
    weight_gradient,
)
from grand_fast.kernels.gpu.diffusion import Field, join_field
from grand_fast.kernels.gpu.sizes import Sizes, row_warps
from grand_fast.kernels.gpu.sums import add_weighted, join, join_lanes, row_dot, zeros
from grand_fast.kernels.gpu.tiles import (
    add_edge_rows,
    edge_offsets,
    gather_rows,
    heads_of,
    load_columns,
    load_piece,
    load_row,
    load_scaled,
    load_slots,
    load_split,
    row_columns,
    turn_columns,
)
from grand_fast.kernels.weighting import Upstream

# Of the gathered tiles, per lane; more edges a turn leave more empty slots behind short rows.
_VALUES = 16


@triton.jit
def no_sums(sizes: tl.constexpr):
    """Σ p, Σ p t (N_H groups of heads each), Σ c p k, Σ c p t k (N_A chunks), before any edge."""
    return (
        zeros(sizes.N_H, sizes.BLOCK_H, sizes),
        zeros(sizes.N_H, sizes.BLOCK_H, sizes),
        zeros(sizes.N_A, sizes.BLOCK_A, sizes),
        zeros(sizes.N_A, sizes.BLOCK_A, sizes),
    )


@triton.jit
def add_to_sums(sums, p, t, k, u, s, w, weighting, top):
    """The sums with one more turn: N_H of [BLOCK_E, BLOCK_G, BLOCK_H or 1], and k in chunks."""
    sum_p = ()
    sum_pt = ()
    cp = ()
    cpt = ()
    for h in tl.static_range(len(p)):
        sum_p = sum_p + (sums[0][h] + tl.sum(p[h], 0),)
        # not by `add_products`: with heads as columns, Triton 3.7 fails to compile it for AMD
        sum_pt = sum_pt + (sums[1][h] + tl.sum(p[h] * t[h], 0),)
        cp_h = past_normalizer(p[h], s[h], weighting, top)
        cp_h = past_function(cp_h, u[h], w, weighting)
        cp = cp + (cp_h,)
        cpt = cpt + (cp_h * t[h],)
    return sum_p, sum_pt, add_weighted(sums[2], cp, k), add_weighted(sums[3], cpt, k)


@triton.jit
def store_dq(dq_ptr, norm_delta_ptr, row, sums, t0, shift, scale, sizes: tl.constexpr):
    """dq of one row, and what the far side needs of it: shift in base 2, 1 / Σ p and Delta.

    sums: N_H of [BLOCK_H], twice, and N_A of [BLOCK_A], twice; shift: as the first. t is counted
    from t0, which cancels in dq. The difference of the two sums can be small against them. So the
    sum that divides them is that of the very p in them, and no other that differs by a rounding of
    scores.
    """
    sum_p, sum_pt, sum_pk, sum_ptk = sums
    chunks: tl.constexpr = sizes.N_A // sizes.N_H
    of_head: tl.constexpr = sizes.BLOCK_A // sizes.BLOCK_H
    for g in tl.static_range(sizes.N_H):
        offs_h, mask_h = heads_of(g, sizes)
        over_p = tl.where(sum_p[g] == 0.0, 0.0, 1.0 / sum_p[g])  # a row without edges: dq = 0
        delta = sum_pt[g] * over_p
        at = norm_delta_ptr + row * (3 * sizes.H) + offs_h
        tl.store(at, shift[g], mask=mask_h)
        tl.store(at + sizes.H, over_p, mask=mask_h)
        tl.store(at + 2 * sizes.H, delta + t0, mask=mask_h)
        for c in tl.static_range(g * chunks, (g + 1) * chunks):
            pk = tl.reshape(sum_pk[c], [sizes.BLOCK_H, of_head])
            ptk = tl.reshape(sum_ptk[c], [sizes.BLOCK_H, of_head])
            dq = (scale * over_p)[:, None] * (ptk - delta[:, None] * pk)
            offs, mask = row_columns("heads", c, sizes)
            dq = tl.reshape(dq, offs.shape).to(dq_ptr.dtype.element_ty)
            tl.store(dq_ptr + row * (sizes.H * sizes.d_k) + offs, dq, mask=mask)


@triton.jit
def store_part(part_ptr, pid_p, sums, t0, shift, sizes: tl.constexpr):
    """The sums of one piece, a row of `part`: Σ c p k | Σ c p t k | Σ p | Σ p t | t0 | shift."""
    columns: tl.constexpr = sizes.N_A * sizes.BLOCK_A
    heads: tl.constexpr = sizes.N_H * sizes.BLOCK_H
    row_ptr = part_ptr + pid_p * (2 * columns + 4 * heads)
    for c in tl.static_range(sizes.N_A):
        at = row_ptr + c * sizes.BLOCK_A + tl.arange(0, sizes.BLOCK_A)
        tl.store(at, sums[2][c])
        tl.store(at + columns, sums[3][c])
    for g in tl.static_range(sizes.N_H):
        offs_h, _ = heads_of(g, sizes)
        at = row_ptr + 2 * columns + offs_h
        tl.store(at, sums[0][g])
        tl.store(at + heads, sums[1][g])
        tl.store(at + 2 * heads, tl.zeros([sizes.BLOCK_H], tl.float32) + t0)
        tl.store(at + 3 * heads, shift[g])


@triton.jit(do_not_specialize=["n_split"])
def _attention_bwd_dq_kernel(
    dq_ptr,
    norm_delta_ptr,
    part_ptr,
    field,
    product,
    da_ptr,
    df_ptr,
    x_ptr,
    alpha_ptr,
    edge_value_ptr,
    q_ptr,
    k_ptr,
    norm_ptr,
    weighting,
    view,
    n_split,
    stride_df_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    scale,
    df_kind: tl.constexpr,
    x_kind: tl.constexpr,
    source: tl.constexpr,
    x_sizes: tl.constexpr,
    sizes: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    offs_e = edge_offsets(sizes)
    q = load_row("heads", q_ptr + row * stride_q_n, sizes)
    top = load_top(weighting)
    shift, inverse = load_norm(norm_ptr, row, weighting, sizes)
    g = ()
    t0 = 0.0
    if source == "state":
        g = load_scaled(df_ptr + row * stride_df_n, alpha_ptr, sizes)
        # After some diffusion neighbours are alike: t − t0 is small, and keeps its digits in sums.
        t0 = row_dot(g, load_row("values", x_ptr + row * stride_x_n, sizes))
    elif x_sizes is not None:
        g = load_row(df_kind, df_ptr + row * stride_df_n, x_sizes)
    sums = no_sums(sizes)
    x_sums = no_values(field, product, x_sizes)
    j_next = load_columns(view, beg, offs_e, count)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j, j_next = turn_columns(j_next, view, beg, e, offs_e, count, x_sizes is not None, sizes)
        k = gather_rows("heads", k_ptr, j, mask_e, stride_k_n, sizes)
        x = ()
        if x_sizes is not None:
            x = gather_rows(x_kind, x_ptr, j, mask_e, stride_x_n, x_sizes)
        slot = load_slots(view, beg + e, offs_e, mask_e)
        k, q_e = add_edge_rows(k, q, weighting.edge_key, slot, mask_e, view, sizes)
        w, u, s = edge_scores(k, q_e, slot, mask_e, weighting, sizes)
        p = ()
        for h in tl.static_range(sizes.N_H):
            p_h = unnormalised(s[h], shift[h], weighting, top)
            p = p + (tl.where(mask_e[:, :, None], p_h, 0.0),)
        t = weight_gradient(
            g, x, t0, da_ptr, edge_value_ptr, slot, mask_e, view, source, x_sizes, sizes
        )
        sums = add_to_sums(sums, p, t, k, u, s, w, weighting, top)
        if len(x_sums) > 0:
            x_sums = add_values(x_sums, weights(s, shift, inverse, weighting, top), x, source)
    sums = (join_lanes(sums[0]), join_lanes(sums[1]), join_lanes(sums[2]), join_lanes(sums[3]))
    if pid_p < n_split:
        store_part(part_ptr, pid_p, sums, t0, shift, sizes)
    else:
        store_dq(dq_ptr, norm_delta_ptr, row, sums, t0, shift, scale, sizes)
    if len(x_sums) > 0:
        store_values(field, product, x_sums, row, pid_p, n_split, source, x_sizes)


@triton.jit
def join_row(part_ptr, first, last, BLOCK: tl.constexpr, width: tl.constexpr):
    """Σ over pieces of BLOCK columns of their rows of `width`, [BLOCK]."""
    offs = tl.arange(0, BLOCK)[:, None]
    return tl.reshape(join(part_ptr, first, last, offs, offs < width, width), [BLOCK])


@triton.jit
def _attention_bwd_dq_join_kernel(
    dq_ptr, norm_delta_ptr, part_ptr, split_row_ptr, split_ptr_ptr, scale, sizes: tl.constexpr
):
    row, first, last = load_split(split_row_ptr, split_ptr_ptr)
    columns: tl.constexpr = sizes.BLOCK_A
    heads: tl.constexpr = sizes.BLOCK_H
    width: tl.constexpr = 2 * columns + 4 * heads
    sum_pk = join_row(part_ptr, first, last, columns, width)
    sum_ptk = join_row(part_ptr + columns, first, last, columns, width)
    part_ptr += 2 * columns
    sum_p = join_row(part_ptr, first, last, heads, width)
    sum_pt = join_row(part_ptr + heads, first, last, heads, width)
    at = part_ptr + first * width + tl.arange(0, heads)  # what is alike in all pieces of a row
    t0 = tl.load(at + 2 * heads)
    shift = tl.load(at + 3 * heads)
    sums = ((sum_p,), (sum_pt,), (sum_pk,), (sum_ptk,))
    store_dq(dq_ptr, norm_delta_ptr, row, sums, t0, (shift,), scale, sizes)


def normalized_side(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    upstream: Upstream,
    *,
    norm: Float[Tensor, "N 2 H"],
    weighting: KernelWeighting,
    csr: Csr,
    field: Field | None,
    product: Product | None,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, "N 3 H"]]:
    """dq, and what the far side needs of a row, see `store_dq`.

    Writes `field`, that of dx, or the `dv` of `product`, if it is given: where senders normalise.
    """
    work, (n, h, d_k) = csr.work, q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    norm_delta = torch.empty((n, 3, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return dq, norm_delta
    scale = weighting.scale / upstream.heads_of_mean(h)
    options = backward_sizes(
        upstream.source, upstream.channels, h, d_k, q.dtype, _VALUES, gathers_norm=False
    )
    joined = _joined(options["sizes"])
    width = 2 * joined["BLOCK_A"] + 4 * joined["BLOCK_H"]
    part = torch.empty((work.n_split, width), dtype=torch.float32, device=q.device)
    _attention_bwd_dq_kernel[(work.piece_row.numel(),)](
        dq, norm_delta, part, field=field, product=product, q_ptr=q, k_ptr=k, norm_ptr=norm,
        weighting=weighting, view=backward_view(csr, upstream, weighting),
        n_split=work.n_split, stride_q_n=q.stride(0), stride_k_n=k.stride(0), scale=scale,
        **state_arguments(upstream), **options,
    )  # fmt: skip
    if work.n_split:
        _attention_bwd_dq_join_kernel[(work.split_row.numel(),)](
            dq, norm_delta, part, split_row_ptr=work.split_row, split_ptr_ptr=work.split_ptr,
            scale=scale, sizes=joined, num_warps=row_warps(joined["BLOCK_A"]),
        )  # fmt: skip
    if field is not None:
        join_field(field, csr)
    return dq, norm_delta


def _joined(sizes: Sizes) -> Sizes:
    """Of a join kernel, whose lanes read all columns and heads of a padded row at once."""
    columns, heads = sizes["N_A"] * sizes["BLOCK_A"], sizes["N_H"] * sizes["BLOCK_H"]
    return Sizes(sizes, BLOCK_H=heads, BLOCK_A=columns, VEC_A=1, N_A=1, N_H=1, BLOCK_E=1, BLOCK_G=1)
