"""What both passes of a backward share: the gradients t of the weights, and those by the values.

`source`, as `Upstream` has it: from the state, t = <alpha · df[i], x[col[e]]>, not yet divided by
H, or given, `da`, of every head or of their mean; or t = <dy[i,h], v[col[e],h] + edge_value[e,h]>
from the values of a product, where kernels have dy as df and v as x.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.scores import KernelWeighting
from grand_fast.kernels.gpu.diffusion import store_sum
from grand_fast.kernels.gpu.pieces import View, view_of
from grand_fast.kernels.gpu.sizes import (
    LANE_COLUMNS,
    edges,
    head_lanes,
    head_sizes,
    product_sizes,
    score_sizes,
    value_lanes,
    value_sizes,
)
from grand_fast.kernels.gpu.sums import (
    add_weighted,
    edge_dot,
    head_dot,
    join_lanes,
    scaled,
    zeros,
)
from grand_fast.kernels.gpu.tiles import add_edge_rows, heads_of, store_piece
from grand_fast.kernels.weighting import Source, Upstream


class Product(NamedTuple):
    """What a pass is to write of a product's gradients, as one argument of kernels; or None.

    dv: [N, H, d], and part: [P, H·d], what is known of it from pieces of split rows. dedge_key:
    [E, H, d_k], dedge_value: [E, H, d], in slots of `A`.
    """

    dv: Tensor | None
    part: Tensor
    dedge_key: Tensor | None
    dedge_value: Tensor | None


@triton.jit
def weight_gradient(
    own, far, t0, da_ptr, edge_value_ptr, slot, mask_e, view, source: tl.constexpr,
    x_sizes: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    """t − t0 of a turn's edges, N_H groups with a column per head; one serves all that are alike.

    own, far: rows of the state, one times alpha, and those at the far ends; or of dy and v. () if t
    is given.
    """
    t = ()
    if source == "state":
        of_all = (edge_dot(far, own, sizes.BLOCK_H, sizes.VEC_D) - t0)[:, :, None]
        for _ in tl.static_range(sizes.N_H):
            t = t + (of_all,)
    elif x_sizes is not None:
        far, own = add_edge_rows(far, own, edge_value_ptr, slot, mask_e, view, x_sizes)
        t = head_dot(far, own, x_sizes)
    else:
        for g in tl.static_range(sizes.N_H):
            at = da_ptr + slot[:, :, None].to(tl.int64)
            mask = mask_e[:, :, None]
            if source == "heads":
                offs_h, mask_h = heads_of(g, sizes)
                at = da_ptr + slot[:, :, None].to(tl.int64) * sizes.H + offs_h
                mask = mask & mask_h
            t = t + (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
    return t


@triton.jit
def no_values(field, product, x_sizes: tl.constexpr):
    """Σ w x, or of each head Σ a x, before the first edge; () if nobody asks for it."""
    sums = ()
    if field is not None:
        sums = zeros(x_sizes.N_D, x_sizes.BLOCK_D, x_sizes)
    elif product is not None and product.dv is not None:
        sums = zeros(x_sizes.N_A, x_sizes.BLOCK_A, x_sizes)
    return sums


@triton.jit
def add_values(sums, a, x, source: tl.constexpr):
    """The sums with one more turn: w = Σ a over heads, a of `weights`; x in chunks."""
    if source != "state":
        return add_weighted(sums, a, x)
    else:
        w = tl.sum(a[0], 2)
        for h in tl.static_range(1, len(a)):
            w += tl.sum(a[h], 2)
        return add_weighted(sums, (w[:, :, None],), x)


@triton.jit
def store_values(
    field, product, sums, row, pid_p, n_split, source: tl.constexpr, x_sizes: tl.constexpr
):  # fmt: skip
    """Write dx, or dv, of a row or of its piece."""
    ax = join_lanes(sums)
    if source != "values":
        ax = scaled(ax, 1 / x_sizes.H)
    if field is not None:
        store_sum(field, ax, row, pid_p, n_split, x_sizes)
    else:
        store_piece("heads", product.dv, product.part, ax, row, pid_p, n_split, x_sizes)


def backward_view(csr: Csr, upstream: Upstream, weighting: KernelWeighting) -> View:
    """With slots in `A` if there are tables of edges."""
    needs_slot = weighting.needs_slot
    needs_slot |= upstream.da is not None or upstream.edge_value is not None
    return view_of(csr, needs_slot=needs_slot)


@lru_cache(maxsize=256)
def backward_sizes(
    source: Source, d: int, h: int, d_k: int, dtype: torch.dtype, values: int, *,
    gathers_norm: bool,
) -> dict[str, Any]:  # fmt: skip
    """Compile-time sizes and warps; d: of what is gathered beside; `values` as in `edges`."""
    if d == 0:
        return score_sizes(h, d_k, dtype, values, per_head=True) | {"x_sizes": None}
    if source != "state":
        return product_sizes(h, d, d_k, values, per_head=gathers_norm)
    # Few lanes a row leave its sums few shuffles, but they are to read the scores' table at once.
    lanes = max(value_lanes(d, LANE_COLUMNS) // 2, head_lanes(h, d_k, LANE_COLUMNS))
    sizes = head_sizes(h, d_k, lanes, LANE_COLUMNS) | value_sizes(d, lanes, LANE_COLUMNS)
    options = edges(sizes, values, scalars=sizes["BLOCK_H"] if gathers_norm else 1)
    return options | {"x_sizes": options["sizes"]}


def state_arguments(upstream: Upstream) -> dict[str, Any]:
    """What kernels are given of it."""
    df, x = upstream.df, upstream.x
    return {
        "da_ptr": upstream.da,
        "df_ptr": df,
        "x_ptr": x,
        "alpha_ptr": upstream.alpha,
        "edge_value_ptr": upstream.edge_value,
        "stride_df_n": 0 if df is None else df.stride(0),
        "stride_x_n": 0 if x is None else x.stride(0),
        "df_kind": _kind(df, upstream.source),
        "x_kind": _kind(x, upstream.source),
        "source": upstream.source,
    }


def _kind(table: Tensor | None, source: Source) -> str:
    """What `row_columns` calls its rows."""
    if source == "state":
        return "values"
    return "shared" if table is not None and table.dim() == 2 else "heads"
