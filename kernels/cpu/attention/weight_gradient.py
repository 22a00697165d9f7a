"""What both passes of the edge attention's backward share (see `cpu/attention/backward.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from grand_fast.kernels.cpu.attention.head_blocks import Block, EdgeView
from grand_fast.kernels.cpu.attention.scores import End, HeadGroup, block_products, load_heads
from grand_fast.kernels.cpu.language import Chunk, Int, Matrix, Vec, chunks
from grand_fast.kernels.cpu.math import fma, transposed_sum
from grand_fast.kernels.cpu.rows import Row
from grand_fast.kernels.weighting import Source, Upstream


class UpstreamSpec(NamedTuple):
    """What kernels are compiled for of an `Upstream`."""

    source: Source
    d: int
    valued: bool

    @classmethod
    def of(cls, upstream: Upstream) -> UpstreamSpec:
        """That of `upstream`."""
        return cls(upstream.source, upstream.channels, upstream.edge_value is not None)

    @property
    def has_rows(self) -> bool:
        """Whether `t` is a product of rows of `df` and `x`, of a diffusion or of values."""
        return self.source not in ("heads", "mean")

    def factor(self, h: int) -> float:
        """Of `a ρ (t − Δ)`: the 1/H of a mean over heads, which `t` and `Δ` leave out."""
        return 1.0 if self.source in ("heads", "values") else 1.0 / h

    def width(self, name: str, h: int) -> int:
        """Numbers in a row of `df`, `x` or their gradients."""
        of_all = self.source == "state" or (name == "df" and self.source == "mean of values")
        return self.d if of_all else h * self.d

    def values(self, view: EdgeView, group: HeadGroup) -> HeadGroup:
        """The heads of the group in rows of values and of their gradients."""
        shared: End | None = None
        if self.source == "mean of values":
            shared = "own" if view.rows == "receiver" else "far"
        return replace(group, d_k=self.d, shared=shared)

    def far_tables(self, view: EdgeView) -> list[tuple[Matrix, int]]:
        """Tables of which `t` of an edge reads the row of its far end."""
        name = "x" if view.rows == "receiver" else "df"
        return self._tables(view, name) if self.has_rows else []

    def edge_tables(self, view: EdgeView) -> list[tuple[Matrix, int]]:
        """Tables of which it reads the row of the edge."""
        return self._tables(view, "edge_value") if self.valued else []

    def own_rows(self, view: EdgeView, *outputs: str) -> list[tuple[Matrix, int]]:
        """Tables of which a row reads its own row, or writes it to one of the `outputs`."""
        if not self.has_rows:
            return []
        own = ["df"] if view.rows == "receiver" else ["x"] + ["df"] * ("dx" in outputs)
        return self._tables(view, *own, *outputs)

    def _tables(self, view: EdgeView, *names: str) -> list[tuple[Matrix, int]]:
        return [(view.kernel.matrix(name), self.width(name, view.h)) for name in names]


def _ready(vec: Vec) -> Callable[[], Vec]:
    return lambda: vec


def weight_gradient_of(
    view: EdgeView, upstream: UpstreamSpec, row: Row
) -> Callable[[HeadGroup, Block], Vec]:
    """Writes `t` of a block.

    From the state or a mean over heads: not yet divided by H.
    """
    k, h = view.kernel, view.h
    if upstream.has_rows:
        own, others = ("df", "x") if view.rows == "receiver" else ("x", "df")
        row_own = k.matrix(own).row(row.node)

        def from_state(group: HeadGroup, block: Block) -> Vec:
            rows = [k.matrix(others).row(node) for node in block.nodes]
            totals = [k.splat(0.0) for _ in rows]
            for c in chunks(upstream.d, k.lanes):
                # Read anew for each block: the scores need the registers.
                own_c = alpha.at(c.start).load(c.lanes) * row_own.at(c.start).load(c.lanes)
                totals = [
                    fma(own_c, other.at(c.start).load(c.lanes), total)
                    for other, total in zip(rows, totals, strict=True)
                ]
            return transposed_sum([_ready(total) for total in totals], k.lanes)

        def from_values(group: HeadGroup, block: Block) -> Vec:
            rows = [k.matrix(others).row(node) for node in block.nodes]
            values = upstream.values(view, group)
            added = view.added("edge_value", block) if upstream.valued else None
            return block_products(values, load_heads(values, row_own), rows, added)

        if upstream.source != "state":
            return from_values
        alpha = k.vector("alpha")
        return from_state

    da = k.vector("da")

    def from_heads(group: HeadGroup, block: Block) -> Vec:
        rows = [da.at(view.slot_in_a(row, slot) * h) for slot in block.slots]
        if len(rows) == 1:
            return rows[0].at(group.first).load_into(k.splat(0.0), 0, group.count)
        return group.load(rows)

    def from_mean(group: HeadGroup, block: Block) -> Vec:
        return group.load_edges([da.at(view.slot_in_a(row, slot)) for slot in block.slots])

    return from_heads if upstream.source == "heads" else from_mean


def add_dw(view: EdgeView, group: HeadGroup, row: Row, e: Int, factor: float, dw: Vec) -> None:
    """Its sum over heads → `dedge_weight`; `dw` is `φ a ρ (t − Δ)` of the block at `e`."""
    dw = group.over_heads(dw * group.of_heads(factor))
    place = view.kernel.vector("dedge_weight").at(view.slot_in_a(row, e))
    group.add_edges(place, dw, (row.end - e).minimum(group.edges))


def head_chunks(groups: Sequence[HeadGroup]) -> list[Chunk]:
    """A row of `q`, `k` or values, head by head."""
    return [c for group in groups for c in group.all_channels()]
