"""How the CPU kernels share out a graph: parts of equal work, pieces of long rows, threads.

Order:    one writer per output element, edges summed in CSR order, the longest rows piece by piece:
          bitwise repeatable for any number of threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grand_fast.kernels.cpu.language import Floats, Int, Kernel, Matrix
from grand_fast.kernels.cpu.machine_code import compile_kernel
from grand_fast.kernels.cpu.threads import run_on_threads
from grand_fast.kernels.csr import Csr

# A row longer than this share of the edges is cut: rows that are not cut end before the rest of a
# pass does, on up to as many threads. Cutting a row costs some launches, and a first sweep over it.
_ROW_SHARE = 1 / 128
CUT_FROM, _CUT_TO = 4096, 32768  # edges; bounds of that length: not worth it, too much scratch
PREFETCH_ELEMENTS = 256  # of a row; the hardware follows a longer one by itself
_PART_EDGES = 4096  # work of one task: some 0.2 ms, so threads finish together
_ROWS_AHEAD = 4  # how far ahead a row's own data is asked for: about the latency of memory
_ROW_EDGES = 3  # a row's own loads and stores cost about as much as three edges


@dataclass(frozen=True, eq=False)
class Work:
    """What `plan` knows of one CSR view. It depends on the graph alone, never on the threads.

    order:      [N], visiting position → row.
    shift:      [N], first slot of that row in the graph's own CSR less that in the view, whose
                rows lie in visiting order.
    bounds:     [parts+1], visiting positions of each part.
    turn:       [parts], the parts in the order in which they are handed out: long ones first, so
                that no thread is left with one in the end.
    longest:    edges of the longest row that is not cut.
    hub_rows:   [hubs], the rows that are cut, which parts leave out;
    hub_pieces: [hubs+1], the pieces of each; piece_position, piece_begin, piece_end: [pieces], the
                visiting position of their row, and their slots in the view.
    All int64.
    """

    order: Tensor
    shift: Tensor
    bounds: Tensor
    turn: Tensor
    longest: int
    hub_rows: Tensor
    hub_pieces: Tensor
    piece_position: Tensor
    piece_begin: Tensor
    piece_end: Tensor

    @cached_property
    def arguments(self) -> dict[str, int]:
        """What kernels take of it: addresses, which live as long as it does, and numbers."""
        of_rows = {"longest": self.longest, "last_position": self.order.numel() - 1}
        arrays = {name: a.data_ptr() for name, a in vars(self).items() if isinstance(a, Tensor)}
        return arrays | of_rows

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses: a copy has its own."""
        return {name: value for name, value in vars(self).items() if name != "arguments"}


def longest_whole_row(edges: int) -> int:
    """Edges of the longest row that is not cut, in a graph of so many edges."""
    return min(max(int(_ROW_SHARE * edges), CUT_FROM), _CUT_TO)


def plan(csr: Csr, order: Callable[[], Tensor | None], *, longest_whole: int | None = None) -> Csr:
    """One view with its rows in visiting order, and its work; once per graph.

    `longest_whole` is `longest_whole_row` of the graph's edges if not given.

    The senders are laid out anew, as many bytes as `col` and `slot` have: the kernels then read
    them as a stream, and know what the rows to come will gather.
    """
    with torch.device("cpu"):  # whatever the default device is
        return _plan(csr, order(), longest_whole or longest_whole_row(int(csr.rowptr[-1])))


def _plan(csr: Csr, rows: Tensor | None, limit: int) -> Csr:
    ptr = csr.rowptr.long()
    natural = torch.arange(csr.rowptr.numel() - 1)
    if rows is None:
        return csr._replace(work=_share_out(ptr, natural, torch.zeros_like(natural), limit))
    degree = ptr.diff()[rows]
    visited = torch.zeros_like(ptr)
    torch.cumsum(degree, 0, out=visited[1:])
    shift = ptr[rows] - visited[:-1]
    slots = torch.repeat_interleave(shift, degree) + torch.arange(csr.col.numel())
    return Csr(
        rowptr=visited.to(csr.rowptr.dtype),
        col=csr.col[slots],
        slot=None if csr.slot is None else csr.slot[slots],
        work=_share_out(visited, rows, shift, limit),
    )


def _share_out(ptr: Tensor, order: Tensor, shift: Tensor, limit: int) -> Work:
    degree = ptr.diff()
    n = degree.numel()
    hubs = (degree > limit).nonzero().flatten()
    whole = degree.masked_fill(degree > limit, 0)
    cost = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(whole + _ROW_EDGES, 0, out=cost[1:])
    parts = max(1, int(cost[-1]) // _PART_EDGES)
    targets = torch.arange(parts + 1) * cost[-1] // parts
    bounds = torch.searchsorted(cost, targets)
    bounds[0], bounds[-1] = 0, n
    is_long = cost[bounds].diff() > 2 * _PART_EDGES

    # A hub's pieces are of nearly equal length, in order: their sums are added in that order.
    pieces = (degree[hubs] + CUT_FROM - 1) // CUT_FROM
    hub_pieces = torch.zeros(hubs.numel() + 1, dtype=torch.int64)
    torch.cumsum(pieces, 0, out=hub_pieces[1:])
    hub = torch.repeat_interleave(torch.arange(hubs.numel()), pieces)
    number = torch.arange(hub.numel()) - hub_pieces[hub]
    position = hubs[hub]
    begin = degree[position] * number // pieces[hub]
    end = degree[position] * (number + 1) // pieces[hub]
    return Work(
        order=order,
        shift=shift,
        bounds=bounds,
        turn=torch.argsort(is_long.long(), descending=True, stable=True),
        longest=max(int(whole.max()), CUT_FROM if len(hubs) else 0) if n else 0,
        hub_rows=order[hubs],
        hub_pieces=hub_pieces,
        piece_position=position,
        piece_begin=ptr[position] + begin,
        piece_end=ptr[position] + end,
    )


@lru_cache(maxsize=64)
def slabs(n: int, rows: int) -> Work:
    """Rows 0 … n − 1 in tasks of so many rows, for a kernel that knows no edges."""
    none = torch.from_numpy(np.empty(0, dtype=np.int64))
    bounds = torch.from_numpy(np.arange(0, n + rows, rows).clip(max=n))
    return Work(none, none, bounds, none, 0, none, none, none, none, none)


def scratch_size(longest: int) -> int:
    """Floats of scratch in which the lanes of each edge of a row lie, up to so many edges."""
    most_lanes = 16  # of an edge, and of a block
    return (longest + 1) * most_lanes


def sum_pieces(partial: Tensor, work: Work) -> Tensor:
    """`partial [pieces, …]` → its sums `[hubs, …]`, in the order of the pieces."""
    return torch.segment_reduce(partial, "sum", offsets=work.hub_pieces, axis=0, unsafe=True)


class Shares:
    """A sum `[size]`, of which each task adds up a share; they are added in the order of tasks.

    In NumPy: a parallel region of torch beside the kernels' threads waits for a core, and was
    seen to cost 15 ms for a sum of 0.1 M numbers.
    """

    def __init__(self, tasks: int, size: int, dtype: torch.dtype) -> None:
        self._shares = np.zeros((tasks, size), dtype=np.float32 if dtype.itemsize == 4 else float)
        self.tensor = torch.from_numpy(self._shares)

    def total(self) -> Tensor:
        """All shares."""
        return torch.from_numpy(self._shares.sum(0))


@dataclass(frozen=True)
class Row:
    """A row of the CSR under a kernel's hands, or a piece of a long one.

    node: the row; begin, end: its slots in the view; shift: what leads from these to the slots of
    the graph's own CSR, in which edge weights lie; out: where its results go, the row or the
    piece; task: the part or piece.
    """

    node: Int
    begin: Int
    end: Int
    shift: Int
    out: Int
    task: Int


@contextmanager
def each_row(
    k: Kernel,
    *,
    pieces: bool,
    own_rows: Sequence[tuple[Matrix, int]] = (),
    own_edges: Floats | None = None,
) -> Iterator[Row]:
    """Every row that is not cut; or every piece of those that are.

    Rows visited one after another lie anywhere in memory, so what a row needs beside the rows it
    gathers is asked for some rows ahead. Without that, visiting in another order costs more than
    it saves.

    Args:
        own_rows: tables of which a row reads or writes its own row; so many elements.
        own_edges: an array `[E]` of which a row reads or writes its own edges.
    """
    order, shift = k.longs("order"), k.longs("shift")
    with k.tasks() as task:
        if pieces:
            p = k.longs("piece_position")[task]
            begin, end = k.longs("piece_begin")[task], k.longs("piece_end")[task]
            yield Row(order[p], begin, end, shift[p], out=task, task=task)
        else:
            bounds, rowptr = k.longs("bounds"), k.indices("rowptr")
            part = k.longs("turn")[task]
            with k.loop(bounds[part], bounds[part + 1]) as p:
                later = (p + _ROWS_AHEAD).minimum(k.number("last_position"))
                for table, n in own_rows:
                    table.row(order[later]).prefetch(min(n, PREFETCH_ELEMENTS))
                if own_edges is not None:
                    own_edges.at(rowptr[later] + shift[later]).prefetch(1)
                begin, end = rowptr[p], rowptr[p + 1]
                with k.when(end - begin <= k.number("longest")):
                    i = order[p]
                    yield Row(i, begin, end, shift[p], out=i, task=part)


class Compiled:
    """A kernel ready to run."""

    def __init__(self, kernel: Kernel) -> None:
        self._function = compile_kernel(kernel.name, kernel.source())
        self._names = [(name, kind == "address") for name, kind in kernel.arguments]
        self._has_scratch = ("scratch", True) in self._names
        self.lanes = kernel.lanes
        self._dtype = np.dtype(f"f{kernel.format.bytes}")

    def __call__(
        self, work: Work, *, pieces: bool, scratch: int = 0, **values: Tensor | int
    ) -> None:
        """Run on every part, or on every piece, of `work`, with torch's number of threads.

        Args:
            scratch: floats of private memory for each thread.
            values: the kernel's arguments by name; a tensor gives its address and row stride.
        """
        n_tasks = work.piece_begin.numel() if pieces else work.bounds.numel() - 1
        if n_tasks == 0:
            return
        threads = max(1, min(torch.get_num_threads(), n_tasks))
        given: dict[str, Any] = work.arguments | values
        given["n_tasks"] = n_tasks
        if self._has_scratch:
            # In NumPy, which no default device of torch touches
            given["scratch"] = torch.from_numpy(np.empty((threads, scratch), dtype=self._dtype))
        # The counter that hands out the tasks lies behind the arguments, and starts at 0.
        buffer = array("q", bytes(8 * (len(self._names) + 1)))
        address, _ = buffer.buffer_info()
        given["counter"] = address + 8 * len(self._names)
        for place, (name, is_address) in enumerate(self._names):
            value = given[name]
            if type(value) is not int:
                value = value.data_ptr() if is_address else value.stride(0)
            buffer[place] = value
        run_on_threads(threads, self._function, address, kept_alive=(given, work, buffer))
