"""Blocks of edges in registers: several edges and heads at once, and their dot products.

Lane `z · width + h` of a block belongs to edge `z` of the block and head `h` of the group. `width`
is the number of heads rounded up to a power of two, and no less than makes BLOCK_EDGES edges a
block: in float32, 1 to 4 heads make blocks of 4 edges, 8 heads of 2. The dot products of a block
are added up together by one transposed sum.

A head that is narrower than a register shares it with its neighbours, and if `d_k` divides the
register, with those of the block's other edges: `d_k` registers hold all products of a block.
Values of heads, `[N, H, d]`, are such vectors too: the same heads with `d` in place of `d_k`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from grand_fast.kernels.cpu.gathered_sums import BLOCK_EDGES
from grand_fast.kernels.cpu.language import Chunk, Floats, Int, Kernel, Vec, chunks
from grand_fast.kernels.cpu.math import add, butterfly, fma, transposed_sum
from grand_fast.kernels.cpu.rows import Row

End = Literal["own", "far"]


@dataclass(frozen=True)
class HeadGroup:
    """Heads that share a register: `first` … `first + count − 1`, `width` lanes an edge.

    shared: the end of the edges of which all heads see the same vector.
    """

    kernel: Kernel
    first: int
    count: int
    d_k: int
    width: int
    shared: End | None = None

    @property
    def edges(self) -> int:
        """Edges of a block."""
        return self.kernel.lanes // self.width

    @property
    def is_packed(self) -> bool:
        """Whether registers hold several heads of q and k."""
        return (
            not self.shared and self.d_k < self.kernel.lanes and self.kernel.lanes % self.d_k == 0
        )

    def start(self, h: int, channels: Chunk, end: End) -> int:
        """Where `channels` of the `h`-th head begin in a row of that end of an edge."""
        return channels.start - (self.first + h) * self.d_k * (self.shared == end)

    def channels(self, h: int) -> list[Chunk]:
        """Where the `h`-th head of the group lies in a row of q or k."""
        return chunks(self.d_k, self.kernel.lanes, (self.first + h) * self.d_k)

    def all_channels(self) -> list[Chunk]:
        """Where its heads lie, in registers that begin with a head or are shared by heads.

        Narrow heads lie side by side, unless what is gathered for them does not.
        """
        if self.d_k < self.kernel.lanes and not self.shared:
            return chunks(self.count * self.d_k, self.kernel.lanes, self.first * self.d_k)
        return [c for h in range(self.count) for c in self.channels(h)]

    def spread(self, vec: Vec, channels: Chunk) -> Vec:
        """Lanes of an edge, one a head → that of the head which each of `channels` belongs to."""
        heads = [(channels.start + i) // self.d_k - self.first for i in range(channels.lanes)]
        return vec.shuffle(heads + [0] * (self.kernel.lanes - channels.lanes))

    def over_heads(self, vec: Vec) -> Vec:
        """The sum over the heads of each edge, in all its lanes."""
        return butterfly(vec, add, 1, self.width)

    def over_edges(self, vec: Vec, operation: Callable[[Vec, Vec], Vec] = add) -> Vec:
        """The sum over the edges of each head, in all its lanes; or what `operation` combines."""
        return butterfly(vec, operation, self.width, self.kernel.lanes)

    def load(self, rows: Sequence[Floats], rest: float = 0.0) -> Vec:
        """One row `[H]` per edge of the block; a single row serves all edges."""
        vec = self.kernel.splat(rest)
        for z, row in enumerate(rows):
            vec = row.at(self.first).load_into(vec, z * self.width, self.count)
        if len(rows) == 1:
            vec = vec.shuffle([lane % self.width for lane in range(self.kernel.lanes)])
        return vec

    def load_edges(self, places: Sequence[Floats]) -> Vec:
        """One number per edge of the block, in all its lanes."""
        vec = self.kernel.splat(0.0)
        for z, place in enumerate(places):
            vec = place.load_into(vec, z * self.width, 1)
        return vec.shuffle([lane - lane % self.width for lane in range(self.kernel.lanes)])

    def store(self, row: Floats, vec: Vec) -> None:
        """Write the heads of the first edge to a row `[H]`."""
        row.at(self.first).store(vec, self.count)

    def load_slots(self, table: Floats, slot: Int, n: Int, h: int) -> Vec:
        """The heads of the first `n` edges of a table `[E, H]`, from `slot` on."""
        packed = table.at(slot * h + self.first).load_first(n * self.count)
        lanes = range(self.kernel.lanes)
        places = [i // self.width * self.count + i % self.width for i in lanes]
        return packed.shuffle(
            [p if i % self.width < self.count else 0 for i, p in zip(lanes, places, strict=True)]
        )

    def store_slots(self, table: Floats, slot: Int, n: Int, h: int, vec: Vec) -> None:
        """Write the heads of the first `n` edges to a table `[E, H]`, from `slot` on."""
        lanes = self.kernel.lanes
        used = [z * self.width + i for z in range(self.edges) for i in range(self.count)]
        packed = vec.shuffle(used + [0] * (lanes - len(used)))
        table.at(slot * h + self.first).store_first(packed, n * self.count)

    def add_edges(self, place: Floats, vec: Vec, n: Int) -> None:
        """Write one number for each of the first `n` edges, added to those of earlier groups."""
        lanes = self.kernel.lanes
        vec = vec.shuffle([z * self.width % lanes for z in range(lanes)])
        place.store_first(vec + place.load_first(n) if self.first else vec, n)

    def of_heads(self, value: float) -> Vec:
        """`value` in the lanes of heads, 0 in those that only fill up the width."""
        used = [lane % self.width < self.count for lane in range(self.kernel.lanes)]
        return self.kernel.constant([value if u else 0.0 for u in used])


def head_groups(k: Kernel, h: int, d_k: int, *, shared: End | None = None) -> list[HeadGroup]:
    """All heads; more than a register has lanes make several groups."""
    width = min(max(1 << (h - 1).bit_length(), k.lanes // BLOCK_EDGES), k.lanes)
    return [HeadGroup(k, i, min(width, h - i), d_k, width, shared) for i in range(0, h, width)]


def load_heads(group: HeadGroup, row: Floats) -> list[list[Vec]]:
    """A row of q or k, head by head; packed, as the registers of one edge."""
    if not group.is_packed:
        return [
            [row.at(group.start(h, c, "own")).load(c.lanes) for c in group.channels(h)]
            for h in range(group.count)
        ]
    lanes, per_edge = group.kernel.lanes, group.width * group.d_k
    vecs = [row.at(c.start).load(c.lanes) for c in group.all_channels()]
    if per_edge < lanes:
        vecs = [vecs[0].shuffle([lane % per_edge for lane in range(lanes)])]
    return [vecs]


def block_slots(group: HeadGroup, row: Row, e: Int) -> list[Int]:
    """The slots of the block that begins at `e`; beyond the row its last edge is repeated."""
    return [(e + z).minimum(row.end - 1) for z in range(group.edges)]


@dataclass(frozen=True)
class Added:
    """A row `[H, d_k]` for each edge of a block, added to the vectors at one end."""

    rows: Sequence[Floats]
    end: End

    def meet(self, own: Vec, far: Vec, more: Vec) -> tuple[Vec, Vec]:
        """The two ends, with `more` where it belongs."""
        return (own + more, far) if self.end == "own" else (own, far + more)


def block_products(
    group: HeadGroup, own: list[list[Vec]], others: Sequence[Floats], added: Added | None = None
) -> Vec:
    """`<own, other>` for each head and each of the block's rows `others`.

    Products and sums run in the same order for receivers and for senders as `own`, so that all
    passes see the same scores bit for bit.
    """
    k = group.kernel
    if group.is_packed:
        return _packed_products(group, own[0], others, added)

    def dot(z: int, h: int) -> Vec:
        total = k.splat(0.0)
        if h < group.count:
            for own_c, c in zip(own[h], group.channels(h), strict=True):
                other = others[z].at(group.start(h, c, "far")).load(c.lanes)
                ends = own_c, other
                if added:
                    ends = added.meet(*ends, added.rows[z].at(c.start).load(c.lanes))
                total = fma(*ends, total)
        return total

    parts = [lambda z=z, h=h: dot(z, h) for z in range(group.edges) for h in range(group.width)]
    return transposed_sum(parts, k.lanes)


def _packed_registers(group: HeadGroup, rows: Sequence[Floats]) -> Iterator[list[Vec]]:
    """A row for each edge of a block: one register of several edges, or the registers of one."""
    k, per_edge = group.kernel, group.width * group.d_k
    if per_edge >= k.lanes:
        for row in rows:
            yield [row.at(c.start).load(c.lanes) for c in group.all_channels()]
        return
    for first in range(0, group.edges, k.lanes // per_edge):
        vec = k.splat(0.0)
        for z in range(k.lanes // per_edge):
            row = rows[first + z].at(group.first * group.d_k)
            vec = row.load_into(vec, z * per_edge, group.count * group.d_k)
        yield [vec]


def _packed_products(
    group: HeadGroup, own: list[Vec], others: Sequence[Floats], added: Added | None
) -> Vec:
    k = group.kernel
    of_edges = _packed_registers(group, added.rows) if added else None
    parts: list[Vec] = []
    for far in _packed_registers(group, others):
        ends = list(zip(own, far, strict=True))
        if added and of_edges:
            more = next(of_edges)
            ends = [added.meet(*pair, vec) for pair, vec in zip(ends, more, strict=True)]
        parts += [own_c * far_c for own_c, far_c in ends]
        parts += [k.splat(0.0)] * (group.width * group.d_k // k.lanes - len(far))
    # The products of a head lie side by side: neighbours are added until one lane a head is left.
    even, odd = range(0, 2 * k.lanes, 2), range(1, 2 * k.lanes, 2)
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [low.shuffle(even, high) + low.shuffle(odd, high) for low, high in pairs]
    return parts[0]


@dataclass(frozen=True)
class RowBuffer:
    """Private memory for the lanes of one row's blocks, a block after the other."""

    first: Floats
    group: HeadGroup
    row: Row

    def at(self, e: Int) -> Floats:
        """The lanes of edge `e`."""
        return self.first.at((e - self.row.begin) * self.group.width)

    def splat(self, lane: int = 0) -> Callable[[Int], Vec]:
        """Edge → that lane of it, in all lanes."""
        return lambda e: self.at(e).at(lane).splat()
