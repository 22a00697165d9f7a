"""Backward of the edge attention: gradients by q and k, and by the values of a diffusion.

With t[e,h] the gradient by the weight a[e,h] and Δ[i,h] = Σ_{e in row i} a[e,h] t[e,h]:
ds[e,h] = a[e,h] · (t[e,h] − Δ[i,h]) / √d_k,  dq[i,h] = Σ_e ds[e,h] k[col[e],h],  dk likewise.

Row pass:    on the CSR of A; recomputes a from lse, gives Δ and dq.
Column pass: on the CSR of Aᵀ; recomputes a from lse, gives dk and, for a diffusion, dx.
The passes stand in `_row_pass.py` and `_column_pass.py`, here what they share.
t comes from `da`, or in a diffusion from the state: t[e,h] = <alpha · df[i], x[col[e]]> / H.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from grand_fast.kernels._cpu import Row
from grand_fast.kernels._diffusion import Term
from grand_fast.kernels._edge_scores import HeadGroup, RowBuffer
from grand_fast.kernels._simd import Int, Kernel, Matrix, Vec, chunks
from grand_fast.kernels._simd_math import add, butterfly, fma, transposed_sum

# Whence the gradient by the weights: the state, `da [E, H]`, or `da [E]` by the mean over heads.
Source = Literal["state", "heads", "mean"]


def _ready(vec: Vec) -> Callable[[], Vec]:
    return lambda: vec


def weight_gradient_of(
    k: Kernel, source: Source, d: int, h: int, row: Row, *, own: str, others: str
) -> Callable[[HeadGroup, Sequence[Int], Sequence[Int]], Vec]:
    """Writes `t` of a block, given its slots in this view and the nodes at its far ends.

    From the state: the product of alpha · own[row] and others[node], not yet divided by H.
    """
    if source == "state":
        alpha, row_own = k.vector("alpha"), k.matrix(own).row(row.node)
        channels = chunks(d, k.lanes)

        def from_state(group: HeadGroup, slots: Sequence[Int], nodes: Sequence[Int]) -> Vec:
            rows = [k.matrix(others).row(node) for node in nodes]
            totals = [k.splat(0.0) for _ in rows]
            for c in channels:
                # Read anew for each block: the scores need the registers.
                own_c = alpha.at(c.start).load(c.lanes) * row_own.at(c.start).load(c.lanes)
                totals = [
                    fma(own_c, other.at(c.start).load(c.lanes), total)
                    for other, total in zip(rows, totals, strict=True)
                ]
            return transposed_sum([_ready(total) for total in totals], k.lanes)

        return from_state

    da = k.vector("da")

    def in_a(slot: Int) -> Int:
        # Row pass: A's own slots are a shift away. Column pass: `slot` leads from Aᵀ to A.
        return slot + row.shift if own == "df" else k.indices("slot")[slot]

    def from_heads(group: HeadGroup, slots: Sequence[Int], nodes: Sequence[Int]) -> Vec:
        rows = [da.at(in_a(slot) * h) for slot in slots]
        if len(rows) == 1:
            return rows[0].at(group.first).load_into(k.splat(0.0), 0, group.count)
        return group.load(rows)

    def from_mean(group: HeadGroup, slots: Sequence[Int], nodes: Sequence[Int]) -> Vec:
        vec = k.splat(0.0)
        for z, slot in enumerate(slots):
            vec = da.at(in_a(slot)).load_into(vec, z * group.width, 1)
        return butterfly(vec, add, 1, group.width)

    return from_heads if source == "heads" else from_mean


def score_gradient(group: HeadGroup, source: Source, h: int, p: Vec, t: Vec, delta: Vec) -> Vec:
    """`ds`, with the 1/H of a mean over heads, which `t` and `delta` leave out."""
    heads = 1 if source == "heads" else h
    factor = group.kernel.splat(1.0 / (heads * math.sqrt(group.d_k)))
    return p * factor * (t - delta)


def head_terms(group: HeadGroup, table: Matrix, ds: RowBuffer) -> list[Term]:
    """`Σ_e ds[e,h] · table[col[e],h]` for the heads of the group."""
    return [
        Term(table, c, weight)
        for i, weight in enumerate(ds.splat(lane) for lane in range(group.count))
        for c in group.channels(i)
    ]


def source_of(x: Tensor | None, da: Tensor | None) -> tuple[Source, int]:
    if da is None:
        assert x is not None
        return "state", x.shape[1]
    return ("mean" if da.dim() == 1 else "heads"), 0


def given(
    df: Tensor | None, x: Tensor | None, alpha: Tensor | None, da: Tensor | None
) -> dict[str, Tensor]:
    named = {"df": df, "x": x, "alpha": alpha, "da": da}
    return {name: value for name, value in named.items() if value is not None}
