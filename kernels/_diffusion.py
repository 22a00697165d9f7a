"""Weighted sums of gathered rows, and what a diffusion makes of them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grand_fast.kernels._cpu import Row, Work, sum_pieces
from grand_fast.kernels._simd import (
    Chunk,
    Floats,
    Int,
    Ints,
    Kernel,
    Matrix,
    Variable,
    Vec,
    chunks,
    fma,
)

MAX_ACCUMULATORS = 16  # of 32 registers; a wider row is summed a block of channels at a time
PREFETCH_EDGES = 16  # how far ahead rows are asked for: about the latency of memory
_PREFETCH_ELEMENTS = 256  # of a row; the hardware follows a longer one by itself


def channel_blocks(d: int, lanes: int) -> list[list[Chunk]]:
    """The channels of a row, in blocks whose accumulators fit the registers."""
    whole = chunks(d, lanes)
    return [whole[i : i + MAX_ACCUMULATORS] for i in range(0, len(whole), MAX_ACCUMULATORS)]


def prefetch_rows(k: Kernel, col: Ints, e: Int, tables: list[tuple[Matrix, int]]) -> None:
    """Ask for the rows of edge `e`, or of the last edge if there is none such.

    `e` runs on into the edges of the next rows, which this thread mostly takes next.
    """
    j = col[e.minimum(k.number("last_edge"))]
    for table, n in tables:
        table.row(j).prefetch(min(n, _PREFETCH_ELEMENTS))


@dataclass(frozen=True)
class Term:
    """`Σ_e weight(e) · table[col[e], chunk]`: one register of a weighted sum of rows."""

    table: Matrix
    chunk: Chunk
    weight: Callable[[Int], Vec]


def accumulate(
    k: Kernel,
    row: Row,
    col: Ints,
    terms: list[Term],
    sums: list[Variable],
    *,
    prefetch: list[tuple[Matrix, int]],
) -> None:
    """Add the edges of `row`, in their order, to the sums of `terms`."""
    with k.loop(row.begin, row.end) as e:
        if prefetch:
            prefetch_rows(k, col, e + PREFETCH_EDGES, prefetch)
        j = col[e]
        rows = {term.table: term.table.row(j) for term in terms}
        weights = {term.weight: term.weight(e) for term in terms}
        for term, total in zip(terms, sums, strict=True):
            gathered = rows[term.table].at(term.chunk.start).load(term.chunk.lanes)
            total.value = fma(weights[term.weight], gathered, total.value)


def weighted_sum(
    k: Kernel,
    row: Row,
    col: Ints,
    table: Matrix,
    block: list[Chunk],
    weight: Callable[[Int], Vec],
    *,
    prefetch: bool,
) -> list[Vec]:
    """`Σ_e weight(e) · table[col[e], block]` over the edges of `row`, in their order."""
    terms = [Term(table, c, weight) for c in block]
    sums = [k.variable(k.splat(0.0)) for _ in block]
    start, width = block[0].start, block[-1].start + block[-1].lanes - block[0].start
    ahead = [(Matrix(table.first.at(start), table.stride), width)] if prefetch else []
    accumulate(k, row, col, terms, sums, prefetch=ahead)
    return [total.value for total in sums]


def store_field(
    k: Kernel, row: Row, block: list[Chunk], ax: list[Vec], x: Matrix, *, has_source: bool
) -> None:
    """`f[i] = alpha · (ax − x[i]) + beta · x0[i]`."""
    for total, c in zip(ax, block, strict=True):
        f = k.vector("alpha").at(c.start).load(c.lanes) * (total - _load(x.row(row.node), c))
        if has_source:
            beta, x0 = k.vector("beta").at(c.start), k.matrix("x0").row(row.node)
            f = fma(beta.load(c.lanes), _load(x0, c), f)
        k.matrix("f").row(row.out).at(c.start).store(f, c.lanes)


def store_field_gradient(
    k: Kernel, row: Row, block: list[Chunk], atg: list[Vec], df: Matrix, *, needs_dalpha: bool
) -> None:
    """`dx[j] = alpha · (atg − df[j])`, and the part's share of `dalpha = Σ_j x[j] (atg − df[j])`."""
    for total, c in zip(atg, block, strict=True):
        net = total - _load(df.row(row.node), c)
        alpha = k.vector("alpha").at(c.start).load(c.lanes)
        k.matrix("dx").row(row.out).at(c.start).store(alpha * net, c.lanes)
        if needs_dalpha:
            share = k.matrix("dalpha").row(row.part).at(c.start)
            x = _load(k.matrix("x").row(row.node), c)
            share.store(fma(x, net, share.load(c.lanes)), c.lanes)


def store_partial(k: Kernel, name: str, row: Row, block: list[Chunk], sums: list[Vec]) -> None:
    """The sums of a piece of a long row, as they are."""
    for total, c in zip(sums, block, strict=True):
        k.matrix(name).row(row.out).at(c.start).store(total, c.lanes)


def finish_field(
    f: Tensor,
    partial: Tensor,
    work: Work,
    *,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    x0: Tensor | None,
) -> None:
    """`store_field` for the long rows, from the sums of their pieces `[pieces, d]`."""
    hubs = work.hub_rows
    field = alpha * (sum_pieces(partial, work) - x[hubs])
    if beta is not None and x0 is not None:
        field += beta * x0[hubs]
    f[hubs] = field


def finish_field_gradient(
    dx: Tensor,
    dalpha: Tensor,
    partial: Tensor,
    work: Work,
    *,
    df: Tensor,
    x: Tensor,
    alpha: Tensor,
) -> None:
    """`store_field_gradient` for the long rows, from the sums of their pieces `[pieces, d]`."""
    hubs = work.hub_rows
    net = sum_pieces(partial, work) - df[hubs]
    dx[hubs] = alpha * net
    dalpha += (x[hubs] * net).sum(0)


def _load(row: Floats, c: Chunk) -> Vec:
    return row.at(c.start).load(c.lanes)
