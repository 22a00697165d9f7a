"""What both passes of a backward share: the gradients t of the weights, and tiles.

`source`, as `Upstream` has it: from the state, t = <alpha · df[i], x[col[e]]>, not yet divided by
H, or given, `da`, of every head or of their mean.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from grand_fast.kernels.gpu.sizes import (
    edges,
    head_lanes,
    head_sizes,
    score_sizes,
    value_lanes,
    value_sizes,
)
from grand_fast.kernels.gpu.sums import add_weighted, edge_dot
from grand_fast.kernels.gpu.tiles import heads_of
from grand_fast.kernels.weighting import Upstream

# A lane reads 128 bits of float32 at once. With 128 bits of a half type, half the lanes would read
# a row, each with twice the registers: fewer warps, slower where two tables are gathered.
LANE_COLUMNS = 4


@triton.jit
def weight_gradient(own, far, t0, da_ptr, slot, mask_e, source: tl.constexpr, sizes: tl.constexpr):
    """t − t0 of a turn's edges, N_H groups with a column per head; one serves all that are alike.

    own, far: rows of the state, one times alpha, and those at the far ends; of `"state"` alone.
    """
    t = ()
    if source == "state":
        of_all = (edge_dot(far, own, sizes.BLOCK_H, sizes.VEC_D) - t0)[:, :, None]
        for _ in tl.static_range(sizes.N_H):
            t = t + (of_all,)
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
def add_values(sums, a, x):
    """Σ w x with one more turn: w = Σ a over heads, a of `weights`; x in chunks."""
    w = tl.sum(a[0], 2)
    for h in tl.static_range(1, len(a)):
        w += tl.sum(a[h], 2)
    return add_weighted(sums, (w[:, :, None],), x)


@lru_cache(maxsize=256)
def backward_sizes(
    d: int, h: int, d_k: int, dtype: torch.dtype, values: int, *, gathers_norm: bool
) -> dict[str, Any]:
    """Compile-time sizes and warps; d: 0 if the state is not gathered; `values` as in `edges`."""
    if d == 0:
        return score_sizes(h, d_k, dtype, values, per_head=True)
    # Few lanes a row leave its sums few shuffles, but they are to read the scores' table at once.
    lanes = max(value_lanes(d, LANE_COLUMNS) // 2, head_lanes(h, d_k, LANE_COLUMNS))
    sizes = head_sizes(h, d_k, lanes, LANE_COLUMNS) | value_sizes(d, lanes, LANE_COLUMNS)
    return edges(sizes, values, scalars=sizes["BLOCK_H"] if gathers_norm else 1)


def state_arguments(upstream: Upstream) -> dict[str, Any]:
    """What kernels are given of it."""
    df, x = upstream.df, upstream.x
    return {
        "da_ptr": upstream.da,
        "df_ptr": df,
        "x_ptr": x,
        "alpha_ptr": upstream.alpha,
        "stride_df_n": 0 if df is None else df.stride(0),
        "stride_x_n": 0 if x is None else x.stride(0),
        "source": upstream.source,
    }
