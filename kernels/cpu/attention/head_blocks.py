"""What a `Weighting` makes of the edges of a row: scores, weights, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from grand_fast.kernels.cpu.attention.scores import (
    Added,
    HeadGroup,
    block_products,
    block_slots,
    head_groups,
)
from grand_fast.kernels.cpu.gathered_sums import ahead, prefetch_rows
from grand_fast.kernels.cpu.language import Floats, Int, Kernel, Matrix, Vec
from grand_fast.kernels.cpu.math import exp, fma, sqrt, where_positive
from grand_fast.kernels.cpu.rows import PREFETCH_ELEMENTS, Row
from grand_fast.kernels.weighting import Weighting

Side = Literal["receiver", "sender"]


@dataclass(frozen=True)
class EdgeSpec:
    """What every kernel of the attention is compiled for."""

    h: int
    d_k: int
    dtype: torch.dtype
    index: torch.dtype
    weighting: Weighting
    weighted: bool
    keyed: bool

    def view(self, name: str, rows: Side) -> EdgeView:
        """The edges in a new kernel of that name."""
        k = Kernel(name, self.dtype, self.index)
        return EdgeView(k, rows, self.h, self.d_k, self.weighting, self.weighted, self.keyed)


@dataclass(frozen=True)
class Block:
    """Edges of a row from slot `e` on; beyond the row its last edge is repeated.

    slots: their slots in the view; nodes: their far ends.
    """

    row: Row
    e: Int
    slots: list[Int]
    nodes: list[Int]


@dataclass(frozen=True)
class Norm:
    """What makes weights of scores: of each head the shift of its scores, and 1 / Σ p."""

    shift: Vec | None  # None for squareplus, which counts from the largest score of all
    inverse: Vec


@dataclass(frozen=True)
class Scores:
    """Of a block: `s = φ(u) · w`, `φ(u)`, and `du_factor = scale · w · φ'(u)`."""

    s: Vec
    phi: Vec
    du_factor: Vec


@dataclass(frozen=True)
class EdgeView:
    """The edges as a kernel sees them, whose rows are receivers (CSR of A) or senders (of Aᵀ).

    Either way the row's own vectors meet those at the far ends of its edges.

    weighted, keyed: there are `edge_weight` and `edge_key`.
    """

    kernel: Kernel
    rows: Side
    h: int
    d_k: int
    weighting: Weighting
    weighted: bool
    keyed: bool = False

    @property
    def own_name(self) -> str:
        """The table of the row's own vectors."""
        return "q" if self.rows == "receiver" else "k"

    @property
    def own(self) -> Matrix:
        """The vectors of the rows."""
        return self.kernel.matrix(self.own_name)

    @property
    def others(self) -> Matrix:
        """The vectors at the far ends."""
        return self.kernel.matrix("k" if self.rows == "receiver" else "q")

    @property
    def are_groups(self) -> bool:
        """Whether weights are normalised over the edges of a row; else over those of far ends."""
        return self.rows == self.weighting.normalize

    @property
    def groups(self) -> list[HeadGroup]:
        """All heads."""
        return head_groups(self.kernel, self.h, self.d_k)

    @property
    def varies(self) -> bool:
        """Whether `du_factor` differs from edge to edge."""
        return self.weighted or self.weighting.function != "identity"

    @property
    def own_rows(self) -> list[tuple[Matrix, int]]:
        """Tables of which the weights of a row's edges read its own row."""
        own = [(self.own, self.h * self.d_k)]
        return own + ([(self.kernel.matrix("norm"), 2 * self.h)] if self.are_groups else [])

    @property
    def own_edges(self) -> Floats | None:
        """An array of which a row reads its own edges."""
        is_read = self.weighted and self.rows == "receiver"
        return self.kernel.vector("edge_weight") if is_read else None

    @property
    def score_tables(self) -> list[tuple[Matrix, int]]:
        """Tables of which the score of an edge reads the row of its far end."""
        return [(self.others, self.h * self.d_k)]

    @property
    def edge_key(self) -> Matrix | None:
        """What edges add to the keys."""
        return self.kernel.matrix("edge_key") if self.keyed else None

    @property
    def weight_tables(self) -> list[tuple[Matrix, int]]:
        """The same for its weight."""
        norm = [] if self.are_groups else [(self.kernel.matrix("norm"), 2 * self.h)]
        return self.score_tables + norm

    def slot_in_a(self, row: Row, slot: Int) -> Int:
        """Slot of the view → slot in the graph's own CSR of A."""
        return slot + row.shift if self.rows == "receiver" else self.kernel.indices("slot")[slot]

    def block(
        self,
        group: HeadGroup,
        row: Row,
        e: Int,
        tables: list[tuple[Matrix, int]],
        edge_tables: Sequence[tuple[Matrix, int]] = (),
    ) -> Block:
        """The block that begins at `e`; asks for what a later one gathers from `tables`.

        edge_tables: further ones, `[E, …]` in slots of `A`.
        """
        k = self.kernel
        col = k.indices("col")
        for z in range(group.edges):
            later = ahead(k, e + z)
            prefetch_rows(col, later, tables)
            if self.weighted and self.rows == "sender":
                k.vector("edge_weight").at(k.indices("slot")[later]).prefetch(1)
            if self.rows == "sender":
                if self.edge_key:
                    edge_tables = [*edge_tables, (self.edge_key, self.h * self.d_k)]
                for table, n in edge_tables:
                    slot = k.indices("slot")[later]
                    table.row(slot).prefetch(min(n, PREFETCH_ELEMENTS))
        slots = block_slots(group, row, e)
        return Block(row, e, slots, [col[slot] for slot in slots])

    def added(self, name: str, block: Block) -> Added:
        """The rows that a table of edges adds to the vectors of senders."""
        slots = [self.slot_in_a(block.row, slot) for slot in block.slots]
        rows = [self.kernel.matrix(name).row(slot) for slot in slots]
        return Added(rows, "own" if self.rows == "sender" else "far")

    def scores(self, group: HeadGroup, own: list[list[Vec]], block: Block) -> Scores:
        """Of the row's own vectors, head by head, with those at the far ends."""
        k, weighting = self.kernel, self.weighting
        scale = k.splat(weighting.scale)
        added = self.added("edge_key", block) if self.keyed else None
        others = [self.others.row(node) for node in block.nodes]
        u = block_products(group, own, others, added) * scale
        if weighting.function == "exp":
            phi = exp(u)
            du_factor = scale * phi
        elif weighting.function == "leaky_relu":
            slope = where_positive(u, k.splat(1.0), k.splat(weighting.slope))
            phi, du_factor = u * slope, scale * slope
        else:
            phi, du_factor = u, scale
        if not self.weighted:
            return Scores(phi, phi, du_factor)
        place = k.vector("edge_weight")
        w = group.load_edges([place.at(self.slot_in_a(block.row, slot)) for slot in block.slots])
        if group.count < group.width:
            # Lanes without a head have no shift that would keep exp of a weight in range.
            w = w * group.of_heads(1.0)
        return Scores(phi * w, phi, du_factor * w)

    def own_norm(self, group: HeadGroup, row: Row) -> Norm | None:
        """What normalises the row's edges; None if that is their far ends'."""
        return self._load_norm(group, [row.node]) if self.are_groups else None

    def _load_norm(self, group: HeadGroup, nodes: list[Int]) -> Norm:
        rows = [self.kernel.matrix("norm").row(node) for node in nodes]
        inverse = group.load([row.at(self.h) for row in rows])
        shifts = self.weighting.normalizer == "softmax"
        return Norm(group.load(rows) if shifts else None, inverse)

    def store_norm(self, group: HeadGroup, place: Floats, norm: Norm) -> None:
        """Write it to a row `[2 H]`."""
        group.store(place, self.kernel.splat(0.0) if norm.shift is None else norm.shift)
        group.store(place.at(self.h), norm.inverse)

    def weights(
        self, group: HeadGroup, block: Block, s: Vec, own_norm: Norm | None
    ) -> tuple[Vec, Vec]:
        """`a` and `a · ρ` (see `Weighting`); 0 beyond the row."""
        k = self.kernel
        norm = own_norm or self._load_norm(group, block.nodes)
        n = (block.row.end - block.e) * group.width
        if norm.shift is not None:
            a = (exp(s - norm.shift) * norm.inverse).first(n, k.splat(0.0))
            return a, a
        v, root = self._from_top(s)
        a_rho = (norm.inverse * k.splat(2.0) / ((root - v) * root)).first(n, k.splat(0.0))
        return a_rho * root, a_rho

    def unnormalised(self, s: Vec, shift: Vec) -> Vec:
        """`p(s)`, of softmax less `shift`."""
        if self.weighting.normalizer == "softmax":
            return exp(s - shift)
        v, root = self._from_top(s)
        return self.kernel.splat(2.0) / (root - v)

    def _from_top(self, s: Vec) -> tuple[Vec, Vec]:
        v = s - self.kernel.vector("top").splat()
        return v, sqrt(fma(v, v, self.kernel.splat(4.0)))
