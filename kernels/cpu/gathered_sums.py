"""Weighted sums of gathered rows, and what a diffusion makes of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grand_fast.kernels.cpu.language import (
    Chunk,
    Floats,
    Int,
    Ints,
    Kernel,
    Matrix,
    Variable,
    Vec,
    chunks,
)
from grand_fast.kernels.cpu.math import fma
from grand_fast.kernels.cpu.rows import PREFETCH_ELEMENTS, Row, Work, sum_pieces
from grand_fast.kernels.csr import Add

MAX_ACCUMULATORS = 16  # of 32 registers; a wider row is summed a block of channels at a time
BLOCK_EDGES = 4  # edges whose products are added up together; more would be idle in short rows
SUM_EDGES = 128  # summed on their own first: the rounding errors of a long row then stay small
PREFETCH_EDGES = 16  # how far ahead rows are asked for: about the latency of memory


def field_arguments(
    f: Tensor,
    x: Tensor,
    *,
    alpha: Tensor,
    beta: Tensor | None,
    x0: Tensor | None,
    add: Add,
) -> dict[str, Any]:
    """The arguments of `store_field`, by name; in the type of x, whatever alpha and beta have."""
    named: dict[str, Any] = {"f": f, "x": x, "alpha": alpha.to(x.dtype)}
    if beta is not None and x0 is not None:
        named |= {"beta": beta.to(x.dtype), "x0": x0}
    if add:
        scales = torch.tensor([scale for scale, _ in add], dtype=x.dtype, device="cpu")
        named |= {"add_scale": scales} | {f"add_{s}": y for s, (_, y) in enumerate(add)}
    return named


def channel_blocks(d: int, lanes: int) -> list[list[Chunk]]:
    """The channels of a row, in blocks whose accumulators fit the registers."""
    whole = chunks(d, lanes)
    return [whole[i : i + MAX_ACCUMULATORS] for i in range(0, len(whole), MAX_ACCUMULATORS)]


def block_of(table: Matrix, block: list[Chunk]) -> tuple[Matrix, int]:
    """The columns of `table` that `block` covers, and their number: what to prefetch."""
    start = min(c.start for c in block)
    return Matrix(table.first.at(start), table.stride), max(
        c.start + c.lanes for c in block
    ) - start


def ahead(k: Kernel, e: Int) -> Int:
    """The edge that lies PREFETCH_EDGES after `e`, or the graph's last.

    It may belong to one of the next rows, which this thread mostly takes next.
    """
    return (e + PREFETCH_EDGES).minimum(k.number("last_edge"))


def prefetch_rows(col: Ints, e: Int, tables: list[tuple[Matrix, int]]) -> None:
    """Ask for the rows that edge `e` gathers: so many elements from each table."""
    j = col[e]
    for table, n in tables:
        table.row(j).prefetch(min(n, PREFETCH_ELEMENTS))


@dataclass(frozen=True)
class Term:
    """`Σ_e weight(e) · (table[col[e], chunk] + added[e, chunk])`: a register of a sum of rows.

    added: a table of edges, in slots of `A`.
    out:   where the sum begins in a row of results, if not where it does in the table's.
    """

    table: Matrix
    chunk: Chunk
    weight: Callable[[Int], Vec]
    added: Matrix | None = None
    out: int | None = None

    @property
    def place(self) -> Chunk:
        """Of the sum in a row of results."""
        return self.chunk if self.out is None else Chunk(self.out, self.chunk.lanes)


@contextmanager
def stretches(k: Kernel, row: Row, edges: int) -> Iterator[Row]:
    """`row` in stretches of at most so many edges."""
    with k.loop(row.begin, row.end, edges) as begin:
        yield replace(row, begin=begin, end=(begin + edges).minimum(row.end))


def accumulate(
    k: Kernel,
    row: Row,
    col: Ints,
    terms: list[Term],
    totals: list[Variable],
    *,
    prefetch: Callable[[Int], None] | None = None,
) -> None:
    """Sum the edges of `row`, in their order, and add the sums to the totals of `terms`.

    `prefetch`, called with each edge, may ask for what later edges need.
    """
    sums = [k.variable(k.splat(0.0)) for _ in terms]
    with k.loop(row.begin, row.end) as e:
        if prefetch:
            prefetch(e)
        j = col[e]
        rows = {term.table: term.table.row(j) for term in terms}
        rows |= {t.added: t.added.row(e + row.shift) for t in terms if t.added}
        weights = {term.weight: term.weight(e) for term in terms}
        for term, partial in zip(terms, sums, strict=True):
            gathered = _load(rows[term.table], term.chunk)
            if term.added:
                gathered = gathered + _load(rows[term.added], term.chunk)
            partial.value = fma(weights[term.weight], gathered, partial.value)
    for partial, total in zip(sums, totals, strict=True):
        total.value = total.value + partial.value


def weighted_sum(
    k: Kernel,
    row: Row,
    col: Ints,
    terms: list[Term],
    *,
    prefetch: Callable[[Int], None] | None = None,
) -> list[Vec]:
    """The sums of `terms` over the edges of `row`, stretch by stretch."""
    totals = [k.variable(k.splat(0.0)) for _ in terms]
    with stretches(k, row, SUM_EDGES) as stretch:
        accumulate(k, stretch, col, terms, totals, prefetch=prefetch)
    return [total.value for total in totals]


def field_rows(k: Kernel, d: int, *, has_source: bool, n_add: int) -> list[tuple[Matrix, int]]:
    """The tables of which `store_field` reads or writes a row's own row."""
    names = ["x", "f"] + ["x0"] * has_source + [f"add_{s}" for s in range(n_add)]
    return [(k.matrix(name), d) for name in names]


def store_field(
    k: Kernel,
    row: Row,
    block: list[Chunk],
    ax: list[Vec],
    x: Matrix,
    *,
    has_source: bool,
    n_add: int,
) -> None:
    """`f[i] = alpha · (ax − x[i]) + beta · x0[i] + Σ_s add_scale[s] · add_s[i]`."""
    for total, c in zip(ax, block, strict=True):
        f = k.vector("alpha").at(c.start).load(c.lanes) * (total - _load(x.row(row.node), c))
        if has_source:
            beta, x0 = k.vector("beta").at(c.start), k.matrix("x0").row(row.node)
            f = fma(beta.load(c.lanes), _load(x0, c), f)
        for s in range(n_add):
            y = k.matrix(f"add_{s}").row(row.node)
            f = fma(k.vector("add_scale").at(s).splat(), _load(y, c), f)
        k.matrix("f").row(row.out).at(c.start).store(f, c.lanes)


def sum_field(
    k: Kernel,
    row: Row,
    d: int,
    weight: Callable[[Int], Vec],
    *,
    has_source: bool,
    n_add: int,
    pieces: bool,
) -> None:
    """`store_field` of `ax = Σ_e weight(e) · x[col[e]]`; of a piece that sum, to `partial`."""
    x, col = k.matrix("x"), k.indices("col")
    for block in channel_blocks(d, k.lanes):

        def prefetch(e: Int, block: list[Chunk] = block) -> None:
            prefetch_rows(col, ahead(k, e), [block_of(x, block)])

        ax = weighted_sum(k, row, col, [Term(x, c, weight) for c in block], prefetch=prefetch)
        if pieces:
            store_partial(k, "partial", row, block, ax)
        else:
            store_field(k, row, block, ax, x, has_source=has_source, n_add=n_add)


def store_field_gradient(
    k: Kernel, row: Row, block: list[Chunk], atg: list[Vec], df: Matrix, *, needs_dalpha: bool
) -> None:
    """`dx[j] = alpha · (atg − df[j]) + x_scale · df[j]`, `dalpha = Σ_j x[j] · (atg − df[j])`.

    A task adds up its own share of `dalpha`.
    """
    x_scale = k.vector("x_scale").splat()
    for total, c in zip(atg, block, strict=True):
        own = _load(df.row(row.node), c)
        net = total - own
        alpha = k.vector("alpha").at(c.start).load(c.lanes)
        dx = fma(x_scale, own, alpha * net)
        k.matrix("dx").row(row.out).at(c.start).store(dx, c.lanes)
        if needs_dalpha:
            share = k.matrix("dalpha").row(row.task).at(c.start)
            x = _load(k.matrix("x").row(row.node), c)
            share.store(fma(x, net, share.load(c.lanes)), c.lanes)


def store_partial(k: Kernel, name: str, row: Row, block: list[Chunk], sums: list[Vec]) -> None:
    """The sums of a piece of a long row, as they are."""
    for total, c in zip(sums, block, strict=True):
        k.matrix(name).row(row.out).at(c.start).store(total, c.lanes)


def finish_field(partial: Tensor, work: Work, arguments: dict[str, Any], add: Add) -> None:
    """`store_field` for the long rows, from the sums of their pieces `[pieces, d]`."""
    hubs = work.hub_rows
    field = arguments["alpha"] * (sum_pieces(partial, work) - arguments["x"][hubs])
    if "x0" in arguments:
        field += arguments["beta"] * arguments["x0"][hubs]
    for scale, y in add:
        field += scale * y[hubs]
    arguments["f"][hubs] = field


def finish_field_gradient(
    dx: Tensor,
    dalpha: Tensor | None,
    partial: Tensor,
    work: Work,
    *,
    df: Tensor,
    x: Tensor,
    alpha: Tensor,
    x_scale: float,
) -> None:
    """`store_field_gradient` for the long rows, from the sums of their pieces `[pieces, d]`."""
    hubs = work.hub_rows
    net = sum_pieces(partial, work) - df[hubs]
    dx[hubs] = alpha * net + x_scale * df[hubs]
    if dalpha is not None:
        dalpha += (x[hubs] * net).sum(0)


def _load(row: Floats, c: Chunk) -> Vec:
    return row.at(c.start).load(c.lanes)
