"""What both passes of the edge attention's backward share (see `cpu/attention/backward.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from grand_fast.kernels.cpu.attention.head_blocks import Block, EdgeView
from grand_fast.kernels.cpu.attention.scores import HeadGroup, RowBuffer
from grand_fast.kernels.cpu.gathered_sums import Term, finish_field_gradient
from grand_fast.kernels.cpu.language import Chunk, Int, Matrix, Vec, chunks
from grand_fast.kernels.cpu.math import fma, transposed_sum
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Row, Shares, Work
from grand_fast.kernels.weighting import Source, Upstream


class StateGradient:
    """`dx` of a diffusion, and `dalpha` if needed, of a pass over the CSR of Aᵀ."""

    def __init__(self, upstream: Upstream, work: Work, *, needs_dalpha: bool) -> None:
        assert upstream.x is not None
        n, d = upstream.x.shape
        dtype = upstream.x.dtype
        self._upstream, self._work = upstream, work
        self._shares = Shares(work.turn.numel(), d, dtype) if needs_dalpha else None
        self._partial: Tensor | None = None
        self.dx = empty(n, d, dtype=dtype)
        self.dalpha: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """What the kernel of whole rows is given."""
        scale = self.dx.new_tensor([self._upstream.x_scale])
        named = {"dx": self.dx, "x_scale": scale}
        return named if self._shares is None else named | {"dalpha": self._shares.tensor}

    def piece_arguments(self) -> dict[str, Any]:
        """What the kernel of pieces is given."""
        pieces = self._work.piece_begin.numel()
        self._partial = empty(pieces, self.dx.shape[1], dtype=self.dx.dtype)
        return {"partial": self._partial}

    def finish(self) -> None:
        """After the kernels: add up."""
        u = self._upstream
        assert u.df is not None and u.x is not None and u.alpha is not None
        if self._shares is not None:
            self.dalpha = self._shares.total()
        if self._partial is not None:
            finish_field_gradient(
                self.dx, self.dalpha, self._partial, self._work, df=u.df, x=u.x, alpha=u.alpha,
                x_scale=u.x_scale,
            )  # fmt: skip


def _ready(vec: Vec) -> Callable[[], Vec]:
    return lambda: vec


def weight_gradient_of(
    view: EdgeView, source: Source, d: int, row: Row
) -> Callable[[HeadGroup, Block], Vec]:
    """Writes `t` of a block.

    From the state or the mean over heads: not yet divided by H.
    """
    k, h = view.kernel, view.h
    if source == "state":
        own, others = ("df", "x") if view.rows == "receiver" else ("x", "df")
        alpha, row_own = k.vector("alpha"), k.matrix(own).row(row.node)
        channels = chunks(d, k.lanes)

        def from_state(group: HeadGroup, block: Block) -> Vec:
            rows = [k.matrix(others).row(node) for node in block.nodes]
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

    def from_heads(group: HeadGroup, block: Block) -> Vec:
        rows = [da.at(view.slot_in_a(row, slot) * h) for slot in block.slots]
        if len(rows) == 1:
            return rows[0].at(group.first).load_into(k.splat(0.0), 0, group.count)
        return group.load(rows)

    def from_mean(group: HeadGroup, block: Block) -> Vec:
        return group.load_edges([da.at(view.slot_in_a(row, slot)) for slot in block.slots])

    return from_heads if source == "heads" else from_mean


def state_tables(view: EdgeView, source: Source, d: int) -> list[tuple[Matrix, int]]:
    """Tables of which `t` of an edge reads the row of its far end."""
    name = "x" if view.rows == "receiver" else "df"
    return [(view.kernel.matrix(name), d)] if source == "state" else []


def own_state_rows(
    view: EdgeView, source: Source, d: int, *, stores_dx: bool
) -> list[tuple[Matrix, int]]:
    """Tables of the state of which a row reads or writes its own row."""
    if source != "state":
        return []
    if view.rows == "receiver":
        return [(view.kernel.matrix("df"), d)]
    names = ("x", "df", "dx") if stores_dx else ("x",)
    return [(view.kernel.matrix(name), d) for name in names]


def score_factor(source: Source, h: int) -> float:
    """Of `a ρ (t − Δ)`: the 1/H of a mean over heads, which `t` and `Δ` leave out."""
    return 1.0 if source == "heads" else 1.0 / h


def add_dw(view: EdgeView, group: HeadGroup, row: Row, e: Int, source: Source, dw: Vec) -> None:
    """Its sum over heads → `dedge_weight`; `dw` is `φ a ρ (t − Δ)` of the block at `e`."""
    dw = group.over_heads(dw * group.of_heads(score_factor(source, view.h)))
    place = view.kernel.vector("dedge_weight").at(view.slot_in_a(row, e))
    group.add_edges(place, dw, (row.end - e).minimum(group.edges))


def head_terms(group: HeadGroup, table: Matrix, du: RowBuffer) -> list[Term]:
    """`Σ_e du[e,h] · table[col[e],h]` for the heads of the group."""
    if group.d_k < group.kernel.lanes:

        def weight(c: Chunk) -> Callable[[Int], Vec]:
            return lambda e: group.spread(du.at(e).load(), c)

        return [Term(table, c, weight(c)) for c in group.all_channels()]
    return [
        Term(table, c, weight)
        for i, weight in enumerate(du.splat(lane) for lane in range(group.count))
        for c in group.channels(i)
    ]


def head_chunks(view: EdgeView) -> list[Chunk]:
    """A row of `q` or `k`, head by head."""
    return [c for group in view.groups for c in group.all_channels()]
