"""Sums over a row's edges of vectors of heads, each edge with a factor a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from grand_fast.kernels.cpu.attention.head_blocks import EdgeView
from grand_fast.kernels.cpu.attention.scores import End, HeadGroup
from grand_fast.kernels.cpu.gathered_sums import MAX_ACCUMULATORS, Term, weighted_sum
from grand_fast.kernels.cpu.language import Chunk, Floats, Int, Kernel, Matrix, Vec
from grand_fast.kernels.cpu.rows import Row


def head_terms(
    group: HeadGroup,
    table: Matrix,
    factors: Callable[[Int], Floats],
    *,
    lanes: int | None = None,
    added: Matrix | None = None,
    end: End = "far",
) -> list[Term]:
    """`Σ_e factors(e)[h] · (table[col[e],h] + added[e,h])`, in the registers of `all_channels`.

    Args:
        table: of the vectors at that `end` of the edges.
        factors: where those of an edge lie, of which so many `lanes` (all by default) may be read.
    """
    if group.d_k < group.kernel.lanes and not group.shared:

        def spread(c: Chunk) -> Callable[[Int], Vec]:
            return lambda e: group.spread(factors(e).load(lanes), c)

        return [Term(table, c, spread(c), added) for c in group.all_channels()]

    def of_head(lane: int) -> Callable[[Int], Vec]:
        return lambda e: factors(e).at(lane).splat()

    return [
        Term(table, Chunk(group.start(h, c, end), c.lanes), weight, added, c.start)
        for h, weight in enumerate(map(of_head, range(group.count)))
        for c in group.channels(h)
    ]


def sums_of(
    k: Kernel,
    row: Row,
    terms: list[Term],
    *,
    prefetch: Callable[[list[Term], Int], None] | None = None,
) -> Iterator[tuple[Vec, Chunk]]:
    """The sums of `terms` over the edges of a row, each with its place in a row of results.

    `prefetch`, called with the terms that are summed and an edge, may ask for what later ones need.
    """
    for i in range(0, len(terms), MAX_ACCUMULATORS):
        part = terms[i : i + MAX_ACCUMULATORS]
        ask = partial(prefetch, part) if prefetch else None
        sums = weighted_sum(k, row, k.indices("col"), part, prefetch=ask)
        yield from zip(sums, [term.place for term in part], strict=True)


def store_products(view: EdgeView, row: Row, terms: list[Term], name: str) -> None:
    """`factors(e)[h] · table[i,h]` of `terms` at the own end → row `e` of a table of edges."""
    with view.kernel.loop(row.begin, row.end) as e:
        place = view.kernel.matrix(name).row(view.slot_in_a(row, e))
        weights = {term.weight: term.weight(e) for term in terms}
        for term in terms:
            own = term.table.row(row.node).at(term.chunk.start).load(term.chunk.lanes)
            place.at(term.place.start).store(weights[term.weight] * own, term.chunk.lanes)
