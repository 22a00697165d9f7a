"""Attention scores in registers: several edges and heads at once, and their softmax over a row.

Lane `z · width + h` of a block of scores belongs to edge `z` of the block and head `h` of the
group. `width` is the number of heads rounded up to a power of two, and no less than makes
BLOCK_EDGES edges a block: in float32, 1 to 4 heads make blocks of 4 edges, 8 heads of 2. The dot
products of a block are added up together by one transposed sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grand_fast.kernels._cpu import Row, Work, sum_pieces
from grand_fast.kernels._diffusion import BLOCK_EDGES, ahead, prefetch_rows, stretches
from grand_fast.kernels._simd import Chunk, Floats, Int, Ints, Kernel, Matrix, Vec, chunks
from grand_fast.kernels._simd_math import (
    add,
    butterfly,
    exp,
    fma,
    log,
    maximum,
    transposed_sum,
)

_SUM_EDGES = 512  # summed on their own first, as SUM_EDGES in `_diffusion.py`


@dataclass(frozen=True)
class HeadGroup:
    """Heads that share a register: `first` … `first + count − 1`, `width` lanes an edge."""

    kernel: Kernel
    first: int
    count: int
    d_k: int
    width: int

    @property
    def edges(self) -> int:
        """Edges of a block."""
        return self.kernel.lanes // self.width

    def channels(self, h: int) -> list[Chunk]:
        """Where the `h`-th head of the group lies in a row of q or k."""
        return chunks(self.d_k, self.kernel.lanes, (self.first + h) * self.d_k)

    def over_heads(self, vec: Vec) -> Vec:
        """The sum over the heads of each edge, in all its lanes."""
        return butterfly(vec, add, 1, self.width)

    def over_edges(self, vec: Vec) -> Vec:
        """The sum over the edges of each head, in all its lanes."""
        return butterfly(vec, add, self.width, self.kernel.lanes)

    def load(self, rows: Sequence[Floats], rest: float = 0.0) -> Vec:
        """One row `[H]` per edge of the block; a single row serves all edges."""
        vec = self.kernel.splat(rest)
        for z, row in enumerate(rows):
            vec = row.at(self.first).load_into(vec, z * self.width, self.count)
        if len(rows) == 1:
            vec = vec.shuffle([lane % self.width for lane in range(self.kernel.lanes)])
        return vec

    def store(self, row: Floats, vec: Vec) -> None:
        """Write the heads of the first edge to a row `[H]`."""
        row.at(self.first).store(vec, self.count)

    def of_heads(self, value: float) -> Vec:
        """`value` in the lanes of heads, 0 in those that only fill up the width."""
        used = [lane % self.width < self.count for lane in range(self.kernel.lanes)]
        return self.kernel.constant([value if u else 0.0 for u in used])


def head_groups(k: Kernel, h: int, d_k: int) -> list[HeadGroup]:
    """All heads; more than a register has lanes make several groups."""
    width = min(max(1 << (h - 1).bit_length(), k.lanes // BLOCK_EDGES), k.lanes)
    return [HeadGroup(k, i, min(width, h - i), d_k, width) for i in range(0, h, width)]


def load_heads(group: HeadGroup, row: Floats) -> list[list[Vec]]:
    """A row of q or k, head by head."""
    return [[row.at(c.start).load(c.lanes) for c in group.channels(h)] for h in range(group.count)]


def block_slots(group: HeadGroup, row: Row, e: Int) -> list[Int]:
    """The slots of the block that begins at `e`; beyond the row its last edge is repeated."""
    return [(e + z).minimum(row.end - 1) for z in range(group.edges)]


def block_scores(group: HeadGroup, own: list[list[Vec]], others: Sequence[Floats]) -> Vec:
    """`<own, other> / √d_k` for each head and each of the block's rows `others`.

    Products and sums run in the same order for receivers and for senders as `own`, so that the
    column pass sees bit for bit the scores of the row pass.
    """
    k = group.kernel

    def dot(z: int, h: int) -> Vec:
        total = k.splat(0.0)
        if h < group.count:
            for own_c, c in zip(own[h], group.channels(h), strict=True):
                total = fma(own_c, others[z].at(c.start).load(c.lanes), total)
        return total

    parts = [lambda z=z, h=h: dot(z, h) for z in range(group.edges) for h in range(group.width)]
    return transposed_sum(parts, k.lanes) * k.splat(1.0 / math.sqrt(group.d_k))


def prefetch_block(group: HeadGroup, col: Ints, e: Int, tables: list[tuple[Matrix, int]]) -> None:
    """Ask for what a later block gathers."""
    for z in range(group.edges):
        prefetch_rows(col, ahead(group.kernel, e + z), tables)


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


def buffer_size(longest: int) -> int:
    """Floats that a `RowBuffer` needs for rows of up to `longest` edges, for any heads."""
    most_lanes = 16  # of an edge, and of a block
    return (longest + 1) * most_lanes


def write_scores(
    group: HeadGroup,
    row: Row,
    q: Matrix,
    key: Matrix,
    col: Ints,
    buffer: RowBuffer,
    tables: list[tuple[Matrix, int]],
) -> Vec:
    """Scores of the row's edges → buffer; returns each head's largest, in all its lanes."""
    k = group.kernel
    lowest = k.splat(-math.inf)
    top = k.variable(lowest)
    own = load_heads(group, q.row(row.node))
    with k.loop(row.begin, row.end, group.edges) as e:
        prefetch_block(group, col, e, tables)
        senders = [key.row(col[slot]) for slot in block_slots(group, row, e)]
        s = block_scores(group, own, senders)
        s = s.first((row.end - e) * group.width, lowest)
        buffer.at(e).store(s)
        top.value = maximum(s, top.value)
    return butterfly(top.value, maximum, group.width, k.lanes)


def exponentiate(group: HeadGroup, row: Row, shift: Vec, buffer: RowBuffer) -> Vec:
    """Scores in the buffer → exp(s − shift); returns each head's sum, in all its lanes."""
    k = group.kernel
    total = k.variable(k.splat(0.0))
    with stretches(k, row, _SUM_EDGES) as part:
        partial = k.variable(k.splat(0.0))
        with k.loop(part.begin, part.end, group.edges) as e:
            p = exp(buffer.at(e).load() - shift)
            buffer.at(e).store(p)
            partial.value = partial.value + p
        total.value = total.value + partial.value
    return group.over_edges(total.value)


def softmax(
    group: HeadGroup,
    row: Row,
    q: Matrix,
    key: Matrix,
    col: Ints,
    lse: Matrix,
    buffer: RowBuffer,
    tables: list[tuple[Matrix, int]],
    *,
    known: bool,
) -> Vec:
    """Unnormalised weights of the row's edges → buffer, log-sum-exp → lse; returns the normaliser.

    `known`: `row` is a piece of a longer one whose `lse` is there already.
    """
    k = group.kernel
    top = write_scores(group, row, q, key, col, buffer, tables)
    if known:
        exponentiate(group, row, group.load([lse.row(row.node)]), buffer)
        return k.splat(1.0)
    total = exponentiate(group, row, top, buffer)
    group.store(lse.row(row.out), top + log(total))  # −inf + anything in a row without edges
    return k.splat(1.0) / total


def combine_lse(partial: Tensor, work: Work) -> Tensor:
    """`lse` of the pieces of long rows `[pieces, H]` → of those rows `[hubs, H]`."""
    top = torch.segment_reduce(partial, "max", offsets=work.hub_pieces, axis=0, unsafe=True)
    hub = torch.repeat_interleave(work.hub_pieces.diff())
    return top + torch.log(sum_pieces(torch.exp(partial - top[hub]), work))
