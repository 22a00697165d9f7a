"""How the CPU kernels share out a graph: parts of equal work, pieces of long rows, threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grand_fast.kernels._compile import compile_kernel
from grand_fast.kernels._simd import Int, Kernel

LONGEST_ROW = 4096  # edges; a longer row is cut, so that no thread waits for another's hub
_PART_EDGES = 4096  # work of one task: some 0.2 ms, so threads finish together
_ROW_EDGES = 3  # a row's own loads and stores cost about as much as three edges


class Work(NamedTuple):
    """What `plan` knows of one CSR view. It depends on the graph alone, never on the threads.

    bounds:     [parts+1], rows of each part.
    longest:    edges of the longest row that is not cut.
    hub_rows:   [hubs], the rows with more than LONGEST_ROW edges, which parts leave out;
    hub_pieces: [hubs+1], the pieces of each; piece_row, piece_begin, piece_end: [pieces].
    All int64.
    """

    bounds: Tensor
    longest: int
    hub_rows: Tensor
    hub_pieces: Tensor
    piece_row: Tensor
    piece_begin: Tensor
    piece_end: Tensor


def plan(rowptr: Tensor) -> Work:
    """Share out the rows of one CSR view; once per graph."""
    ptr = rowptr.long()
    degree = ptr.diff()
    n = degree.numel()
    hub_rows = (degree > LONGEST_ROW).nonzero().flatten()
    cost = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(degree.masked_fill(degree > LONGEST_ROW, 0) + _ROW_EDGES, 0, out=cost[1:])
    parts = max(1, int(cost[-1]) // _PART_EDGES)
    targets = torch.arange(parts + 1) * cost[-1] // parts
    bounds = torch.searchsorted(cost, targets)
    bounds[0], bounds[-1] = 0, n

    # A hub's pieces are of nearly equal length, in order: their sums are added in that order.
    pieces = (degree[hub_rows] + LONGEST_ROW - 1) // LONGEST_ROW
    hub_pieces = torch.zeros(hub_rows.numel() + 1, dtype=torch.int64)
    torch.cumsum(pieces, 0, out=hub_pieces[1:])
    hub = torch.repeat_interleave(torch.arange(hub_rows.numel()), pieces)
    number = torch.arange(hub.numel()) - hub_pieces[hub]
    piece_row = hub_rows[hub]
    begin = degree[piece_row] * number // pieces[hub]
    end = degree[piece_row] * (number + 1) // pieces[hub]
    return Work(
        bounds=bounds,
        longest=int(degree.clamp(max=LONGEST_ROW).max()) if n else 0,
        hub_rows=hub_rows,
        hub_pieces=hub_pieces,
        piece_row=piece_row,
        piece_begin=ptr[piece_row] + begin,
        piece_end=ptr[piece_row] + end,
    )


def slabs(n: int, rows: int) -> Work:
    """Rows 0 … n − 1 in tasks of so many rows, for a kernel that knows no edges."""
    none = torch.empty(0, dtype=torch.int64)
    bounds = torch.arange(0, n + rows, rows).clamp_(max=n)
    return Work(bounds, 0, none, none, none, none, none)


def sum_pieces(partial: Tensor, work: Work) -> Tensor:
    """`partial [pieces, …]` → its sums `[hubs, …]`, in the order of the pieces."""
    return torch.segment_reduce(partial, "sum", offsets=work.hub_pieces, axis=0, unsafe=True)


@dataclass(frozen=True)
class Row:
    """A row of the CSR under a kernel's hands, or a piece of a long one.

    node: the row; begin, end: its slots; out: where its results go, the row or the piece;
    task: the part or piece.
    """

    node: Int
    begin: Int
    end: Int
    out: Int
    task: Int


@contextmanager
def each_row(k: Kernel, *, pieces: bool) -> Iterator[Row]:
    """Every row of at most LONGEST_ROW edges; or every piece of the longer ones."""
    with k.tasks() as task:
        if pieces:
            begin, end = k.longs("piece_begin")[task], k.longs("piece_end")[task]
            yield Row(k.longs("piece_row")[task], begin, end, task, task)
        else:
            bounds, rowptr = k.longs("bounds"), k.indices("rowptr")
            with k.loop(bounds[task], bounds[task + 1]) as i:
                begin, end = rowptr[i], rowptr[i + 1]
                with k.when(end - begin <= LONGEST_ROW):
                    yield Row(i, begin, end, i, task)


class Compiled:
    """A kernel ready to run."""

    def __init__(self, kernel: Kernel) -> None:
        self._function = compile_kernel(kernel.name, kernel.source())
        self._arguments = kernel.arguments
        self.lanes = kernel.lanes
        self._dtype = next(t for t, b in _FLOAT_BITS.items() if b == kernel.format.bits)

    def __call__(
        self, work: Work, *, pieces: bool, scratch: int = 0, **values: Tensor | int
    ) -> None:
        """Run on every part, or on every piece, of `work`, with torch's number of threads.

        Args:
            scratch: floats of private memory for each thread.
            values: the kernel's arguments by name; a tensor gives its address and row stride.
        """
        n_tasks = work.piece_row.numel() if pieces else work.bounds.numel() - 1
        if n_tasks == 0:
            return
        threads = max(1, min(torch.get_num_threads(), n_tasks))
        values |= {
            "n_tasks": n_tasks,
            "counter": torch.zeros(1, dtype=torch.int64),
            "scratch": torch.empty(threads, scratch, dtype=self._dtype),
            **work._asdict(),
        }
        arguments = (ctypes.c_int64 * len(self._arguments))(
            *(_argument(values[name], kind) for name, kind in self._arguments)
        )
        address = ctypes.addressof(arguments)
        # Plain threads, because the kernel runs without the GIL: no OpenMP runtime of our own to
        # clash with torch's or to break in a forked child, and callers need no lock. Tasks go to
        # whoever is free; a helper that has not even started when all are taken is called off.
        helpers = [_pool.submit(self._function, address, t) for t in range(1, threads)]
        self._function(address, 0)
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _argument(value: Tensor | int, kind: str) -> int:
    if isinstance(value, int):
        return value
    return value.data_ptr() if kind == "address" else value.stride(0)


_FLOAT_BITS = {torch.float32: 32, torch.float64: 64}


def _new_pool() -> None:
    global _pool
    _pool = ThreadPoolExecutor(max(1, os.cpu_count() or 1), thread_name_prefix="grand_fast")


_pool: ThreadPoolExecutor
_new_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_pool)  # a child has none of its parent's threads
