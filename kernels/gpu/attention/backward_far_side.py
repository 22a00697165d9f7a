"""The pass of the backward over the other view: dk, see `backward.py`.

With it the gradients of edge weights, which need Delta, and by the largest score.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.normalizer import gather_norm
from grand_fast.kernels.gpu.attention.scores import (
    KernelWeighting,
    edge_scores,
    edge_weight_gradient,
    load_top,
    past_function,
    past_normalizer,
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
from grand_fast.kernels.gpu.sizes import row_warps
from grand_fast.kernels.gpu.sums import add_weighted, join, join_lanes, scaled, zeros
from grand_fast.kernels.gpu.tiles import (
    add_edge_rows,
    edge_offsets,
    gather_rows,
    load_columns,
    load_piece,
    load_row,
    load_scaled,
    load_slots,
    load_split,
    store_edge_rows,
    store_piece,
    turn_columns,
)
from grand_fast.kernels.weighting import Upstream

# Of the gathered tiles, per lane; registers have other uses here.
_VALUES, _VALUES_OF_SCORES = 24, 16


@triton.jit
def all_scores(sums):
    """The sum over all heads and groups of lanes."""
    total = tl.sum(tl.sum(sums[0], 0), 0)
    for h in tl.static_range(1, len(sums)):
        total += tl.sum(tl.sum(sums[h], 0), 0)
    return total


@triton.jit(do_not_specialize=["n_split"])
def _attention_bwd_dk_kernel(
    dk_ptr,
    dw_ptr,
    dtop_ptr,
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
    has_dk: tl.constexpr = dk_ptr is not None
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    offs_e = edge_offsets(sizes)
    k = load_row("heads", k_ptr + row * stride_k_n, sizes)
    top = load_top(weighting)
    x = ()
    k_sums = ()
    top_sums = ()
    if has_dk:
        if source == "state":
            x = load_scaled(x_ptr + row * stride_x_n, alpha_ptr, sizes)
        elif x_sizes is not None:
            x = load_row(x_kind, x_ptr + row * stride_x_n, x_sizes)
        k_sums = zeros(sizes.N_A, sizes.BLOCK_A, sizes)
        if weighting.top is not None:
            top_sums = zeros(sizes.N_H, sizes.BLOCK_H, sizes)
    x_sums = no_values(field, product, x_sizes)
    i_next = load_columns(view, beg, offs_e, count)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        i, i_next = turn_columns(i_next, view, beg, e, offs_e, count, x_sizes is not None, sizes)
        slot = load_slots(view, beg, e + offs_e, mask_e)
        q = gather_rows("heads", q_ptr, i, mask_e, stride_q_n, sizes)
        df = ()
        if x_sizes is not None:
            df = gather_rows(df_kind, df_ptr, i, mask_e, stride_df_n, x_sizes)
        q, k_e = add_edge_rows(q, k, weighting.edge_key, slot, mask_e, view, sizes)
        w, u, s = edge_scores(q, k_e, slot, mask_e, weighting, sizes)
        t = ()
        if has_dk:
            t = weight_gradient(
                x, df, 0.0, da_ptr, edge_value_ptr, slot, mask_e, view, source, x_sizes, sizes
            )
        shift, inverse, delta = gather_norm(norm_ptr, i, mask_e, weighting, has_dk, sizes)
        a = weights(s, shift, inverse, weighting, top)
        if has_dk:
            ds = ()
            du = ()
            for h in tl.static_range(sizes.N_H):
                ds_h = past_normalizer(a[h] * (t[h] - delta[h]), s[h], weighting, top)
                ds = ds + (ds_h,)
                du = du + (past_function(ds_h, u[h], w, weighting),)
            k_sums = add_weighted(k_sums, du, q)
            if dw_ptr is not None:
                dw = edge_weight_gradient(ds, u, weighting)
                if source != "heads" and source != "values":
                    dw /= sizes.H
                tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=mask_e)
            if weighting.top is not None:
                sums = top_sums
                top_sums = ()
                for h in tl.static_range(sizes.N_H):
                    top_sums = top_sums + (sums[h] + tl.sum(ds[h], 0),)
            if product is not None and product.dedge_key is not None:
                store_edge_rows(product.dedge_key, du, q, k, scale, slot, mask_e, view, sizes)
        if len(x_sums) > 0:
            x_sums = add_values(x_sums, a, df, source)
        if product is not None and product.dedge_value is not None:
            of_head = 1.0 if source == "values" else 1 / sizes.H
            store_edge_rows(product.dedge_value, a, df, x, of_head, slot, mask_e, view, x_sizes)
    if len(x_sums) > 0:
        store_values(field, product, x_sums, row, pid_p, n_split, source, x_sizes)
    if has_dk:
        dk = scaled(join_lanes(k_sums), scale)
        store_piece("heads", dk_ptr, part_ptr, dk, row, pid_p, n_split, sizes)
        if weighting.top is not None:
            tl.store(dtop_ptr + pid_p, all_scores(top_sums))


@triton.jit
def _attention_bwd_dk_join_kernel(
    dk_ptr, part_ptr, split_row_ptr, split_ptr_ptr, width: tl.constexpr, BLOCK_A: tl.constexpr
):
    row, first, last = load_split(split_row_ptr, split_ptr_ptr)
    offs_a = tl.arange(0, BLOCK_A)[:, None]
    dk = join(part_ptr, first, last, offs_a, offs_a < width, width)
    tl.store(dk_ptr + row * width + offs_a, dk.to(dk_ptr.dtype.element_ty), mask=offs_a < width)


def join_rows(table: Tensor, part: Float[Tensor, "pieces width"], csr: Csr) -> None:
    """Write the rows of several pieces, each of `width` columns in a row of the table."""
    work, width = csr.work, part.shape[1]
    if work.n_split:
        columns = int(triton.next_power_of_2(width))
        _attention_bwd_dk_join_kernel[(work.split_row.numel(),)](
            table, part, work.split_row, split_ptr_ptr=work.split_ptr, width=width,
            BLOCK_A=columns, num_warps=row_warps(columns),
        )  # fmt: skip


def far_side(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    upstream: Upstream,
    *,
    norm: Float[Tensor, "N 2 H"],
    norm_delta: Float[Tensor, "N 3 H"] | None,
    weighting: KernelWeighting,
    csr: Csr,
    field: Field | None,
    product: Product | None,
    needs_dedge_weight: bool,
) -> tuple[Float[Tensor, "N H d_k"] | None, Float[Tensor, " E"] | None, Float[Tensor, ""] | None]:
    """dk, dedge_weight and dtop, if `norm_delta` is given; writes `field`, that of dx, if it is.

    And what `product` asks for, of which dedge_key needs `norm_delta`, too.
    """
    work, (n, h, d_k) = csr.work, q.shape
    programs, edge_weight = work.piece_row.numel(), weighting.edge_weight
    dk = part = dw = part_top = None
    if norm_delta is not None:
        norm = norm_delta
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        part = torch.empty((work.n_split, h * d_k), dtype=torch.float32, device=k.device)
        if needs_dedge_weight and edge_weight is not None:
            dw = torch.empty(edge_weight.shape, dtype=edge_weight.dtype, device=k.device)
        if weighting.top is not None:
            part_top = torch.empty((programs,), dtype=torch.float32, device=k.device)
    heads = upstream.heads_of_mean(h)
    if n:
        values = _VALUES if upstream.channels else _VALUES_OF_SCORES
        _attention_bwd_dk_kernel[(programs,)](
            dk, dw, part_top, part_ptr=part, field=field, product=product, q_ptr=q, k_ptr=k,
            norm_ptr=norm, weighting=weighting, n_split=work.n_split, stride_q_n=q.stride(0),
            view=backward_view(csr, upstream, weighting), stride_k_n=k.stride(0),
            scale=weighting.scale / heads, **state_arguments(upstream),
            **backward_sizes(
                upstream.source, upstream.channels, h, d_k, q.dtype, values, gathers_norm=True
            ),
        )  # fmt: skip
        if field is not None:
            join_field(field, csr)
        if dk is not None and part is not None:
            join_rows(dk, part, csr)
    return dk, dw, None if part_top is None else part_top.sum() / -heads
