"""In which order the CPU kernels visit the rows of a graph.

Rows that share senders should be computed soon after one another, while the gathered rows are
still in the caches. Reverse Cuthill–McKee walks the graph breadth first from a node at its rim and
so brings such rows together; the numbering of the nodes stays the user's. On ogbn-arxiv, 32,768
edges visited one after another gather 0.73 different rows per edge by number and 0.49 in that
order. To find it takes 70 ms, once per graph. (A breadth-first walk from the largest hub takes
20 ms, gathers 2 % more, and needs a start in every component.)

The order is used only where it helps: a graph numbered by community has a better one already, and
in a graph of random edges there is none.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from grand_fast.kernels.csr import Csr

_SMALL = 1 << 15  # nodes; 16 MiB of rows of 512 bytes: they stay in the last-level cache anyway
_LARGEST = 50_000_000  # edges; a random graph of a million nodes takes 60 ns for each, so 3 s
# Σ degree²: scipy sorts the neighbours of each node by insertion, a quarter of a nanosecond each. A
# hub of 10^5 neighbours would take seconds; arxiv has 8·10^8.
_LARGEST_HUBS = 4e9
_WINDOW = 1 << 15  # edges; as many rows of 512 bytes as that cache holds
_SAMPLES = 32  # windows of each view, spread evenly: arxiv's share to 0.02 in 25 ms
_LOCAL = 0.35  # distinct senders per edge; a row-by-row grid has 0.22, and 0.22 in its best order
# Part of the distinct senders that the order must save. A random graph of a million nodes with 6
# edges each saves 10 % and gains no time; arxiv saves 33 %, and a sixth of its time.
_GAIN = 0.2


def visiting_order(csr: Csr, csr_t: Csr) -> Tensor | None:
    """Visiting position → row, int64 `[N]`, for both views; None: by number."""
    n = csr.rowptr.numel() - 1
    if n < _SMALL or csr.col.numel() > _LARGEST:
        return None
    degrees = (view.rowptr.diff().double() for view in (csr, csr_t))
    if any(float(degree @ degree) > _LARGEST_HUBS for degree in degrees):
        return None
    share = _distinct_share(csr, csr_t, torch.arange(n))
    if share < _LOCAL:
        return None
    order = reverse_cuthill_mckee(csr, csr_t)
    return order if _distinct_share(csr, csr_t, order) <= (1 - _GAIN) * share else None


def reverse_cuthill_mckee(csr: Csr, csr_t: Csr) -> Tensor:
    """Position → node, int64 `[N]`, such that neighbours, in either direction, lie close."""
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    n = csr.rowptr.numel() - 1
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    matrix = _pattern(csr)
    if not (torch.equal(csr.rowptr, csr_t.rowptr) and torch.equal(csr.col, csr_t.col)):
        matrix = (matrix + _pattern(csr_t)).tocsr()
    order = reverse_cuthill_mckee(matrix, symmetric_mode=True)
    return torch.from_numpy(order.astype(np.int64))


def _pattern(csr: Csr) -> Any:
    from scipy.sparse import csr_array

    n = csr.rowptr.numel() - 1
    ones = np.ones(csr.col.numel(), dtype=np.bool_)
    return csr_array((ones, csr.col.cpu().numpy(), csr.rowptr.cpu().numpy()), shape=(n, n))


def _distinct_share(csr: Csr, csr_t: Csr, order: Tensor) -> float:
    """Different rows gathered per edge, within windows of edges visited one after another."""
    distinct = edges = 0
    for view in (csr, csr_t):
        for senders in _windows(view, order):
            seen = torch.zeros(order.numel(), dtype=torch.bool)
            seen[senders] = True
            distinct += int(seen.sum())
            edges += senders.numel()
    return distinct / max(1, edges)


def _windows(csr: Csr, order: Tensor) -> list[Tensor]:
    """The senders of some windows of whole rows."""
    begin = csr.rowptr[:-1][order].long()
    degree = csr.rowptr.diff()[order].long()
    ends = degree.cumsum(0)
    starts = torch.arange(_SAMPLES) * (csr.col.numel() - _WINDOW) // (_SAMPLES - 1)
    first = torch.searchsorted(ends, starts.clamp(min=0))
    last = torch.searchsorted(ends, starts.clamp(min=0) + _WINDOW)
    windows = []
    for p, stop in zip(first.tolist(), last.tolist(), strict=True):
        rows = slice(p, stop + 1)
        before = ends[rows] - degree[rows] - (ends[p] - degree[p])
        shift = torch.repeat_interleave(begin[rows] - before, degree[rows])
        windows.append(csr.col[shift + torch.arange(shift.numel())].long())
    return windows
