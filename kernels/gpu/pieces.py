"""The work list that GPU kernels share: rows cut into pieces, and the device they run on.

Every kernel has one shape. A program takes a piece: at most `PIECE_EDGES` edges of one row. It
gathers rows of a table in tiles (`gpu/tiles.py`) and sums over its edges. A row of several
pieces leaves partial sums, which a join kernel adds in the order of its pieces: one writer per
element, bitwise repeatable.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from grand_fast.kernels.csr import Csr

P = ParamSpec("P")
R = TypeVar("R")

PIECE_EDGES = 256  # a hub of 13 000 edges takes 51 programs; its rounds of loads no longer show


class Work(NamedTuple):
    """The pieces of one CSR view; those of split rows first, in order, then one per other row.

    piece_row, piece_beg, piece_end: [P], row of a piece and its slots `beg ≤ slot < end`.
    split_row: [S], rows of more than one piece; split_ptr: [S+1], their pieces.
    n_split:   number of pieces that belong to split rows.
    """

    piece_row: Tensor
    piece_beg: Tensor
    piece_end: Tensor
    split_row: Tensor
    split_ptr: Tensor
    n_split: int


class View(NamedTuple):
    """The edges of a CSR view and their pieces, as one argument of kernels; `slot` may be None."""

    col: Tensor
    slot: Tensor | None
    piece_row: Tensor
    piece_beg: Tensor
    piece_end: Tensor


def view_of(csr: Csr, *, needs_slot: bool = True) -> View:
    """`needs_slot`: whether kernels look up what lies in slots of `A`."""
    work = csr.work
    slot = csr.slot if needs_slot else None
    return View(csr.col, slot, work.piece_row, work.piece_beg, work.piece_end)


def plan(csr: Csr, order: Callable[[], Tensor | None], *, piece_edges: int = PIECE_EDGES) -> Csr:
    """The view with its work list. `order` is for the CPU: a GPU starts programs as it likes."""
    return csr._replace(work=cut(csr.rowptr, piece_edges=piece_edges))


def cut(rowptr: Tensor, *, piece_edges: int = PIECE_EDGES) -> Work:
    """Cut the rows of a CSR view into pieces of at most `piece_edges` edges; once per view."""
    index = rowptr.dtype
    degree = rowptr.diff()
    # a row without edges is one empty piece: somebody has to write its output
    pieces = ((degree + piece_edges - 1) // piece_edges).clamp(min=1)
    split_row = (pieces > 1).nonzero().flatten()
    whole_row = (pieces == 1).nonzero().flatten()
    count = pieces[split_row]
    split_ptr = torch.zeros(split_row.numel() + 1, dtype=torch.int64, device=rowptr.device)
    split_ptr[1:] = count.cumsum(0)
    n_split = int(split_ptr[-1])
    piece_row = torch.cat([split_row.repeat_interleave(count, output_size=n_split), whole_row])
    before = torch.zeros_like(piece_row)  # pieces of the same row before this one
    first = split_ptr[:-1].repeat_interleave(count, output_size=n_split)
    before[:n_split] = torch.arange(n_split, device=rowptr.device) - first
    piece_beg = rowptr[piece_row] + before * piece_edges
    piece_end = torch.minimum(piece_beg + piece_edges, rowptr[piece_row + 1])
    return Work(
        piece_row=piece_row.to(index),
        piece_beg=piece_beg.to(index),
        piece_end=piece_end.to(index),
        split_row=split_row.to(index),
        split_ptr=split_ptr.to(index),
        n_split=n_split,
    )


def launcher(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Run a launcher on the device of its first argument, which need not be the current one."""

    @functools.wraps(function)
    def call(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return function(first, *args, **kwargs)

    return call
