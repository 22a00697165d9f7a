"""How many of the gathered rows a cache of a given size would miss, from the graph alone."""

import numba
import numpy as np
from numpy.typing import NDArray

from bench.gpu_report.compile import Launch
from grand_fast import Graph
from grand_fast.kernels.cpu.row_order import reverse_cuthill_mckee


class Reuse:
    """The distances at which a sequence of rows comes back to one of them, counted."""

    def __init__(self, rows: NDArray[np.int32], nodes: int) -> None:
        self._histogram = _distances(rows, nodes)
        self._visits, self._nodes = len(rows), nodes

    def misses(self, capacity: int) -> int:
        """Visits whose row is not in a cache of `capacity` rows that drops the least recent one."""
        return int(self._histogram[min(max(capacity, 0), self._nodes) :].sum())

    def miss_share(self, capacity: int) -> float:
        """The same, of all visits."""
        return self.misses(capacity) / max(1, self._visits)


def community_order(graph: Graph) -> NDArray[np.int64]:
    """Row → its position in the reverse Cuthill–McKee order, which brings shared senders close."""
    order = reverse_cuthill_mckee(graph.csr(), graph.csr(transposed=True)).numpy()
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return position


def gathered_rows(launch: Launch, position: NDArray[np.int64] | None = None) -> NDArray[np.int32]:
    """The rows that a launch gathers, edge by edge, as its programs begin: pieces of hubs first.

    Programs that run at once take turns, in an order that nobody knows; this is that of one after
    the other. With `position`, the graph is renumbered by it.
    """
    arguments, programs = launch.arguments, launch.grid[0]
    row, beg, end = (arguments[f"piece_{name}_ptr"][:programs].numpy()
                     for name in ("row", "beg", "end"))  # fmt: skip
    if position is not None:
        is_whole = np.arange(programs) >= arguments.get("n_split", programs)
        order = np.lexsort((beg, position[row], is_whole))
        beg, end = beg[order], end[order]
    length = (end - beg).astype(np.int64)
    first = beg - (length.cumsum() - length)
    slots = np.repeat(first, length) + np.arange(length.sum())
    senders: NDArray[np.int32] = arguments["col_ptr"].numpy()[slots]
    return senders


@numba.njit()
def _distances(rows: NDArray[np.int32], nodes: int) -> NDArray[np.int64]:
    """Histogram [N+1] of the other rows visited since a row's last visit; first visits at N.

    A Fenwick tree over the steps has a one at the latest visit of each row, so the rows visited
    between two steps are a difference of two prefix sums.
    """
    steps = len(rows)
    tree = np.zeros(steps + 1, np.int32)
    last = np.full(nodes, -1, np.int64)
    histogram = np.zeros(nodes + 1, np.int64)
    for step in range(steps):
        row = rows[step]
        before = last[row]
        if before < 0:
            histogram[nodes] += 1
        else:
            others = 0
            i = step
            while i > 0:
                others += tree[i]
                i -= i & -i
            i = before + 1
            while i > 0:
                others -= tree[i]
                i -= i & -i
            histogram[others] += 1
            i = before + 1
            while i <= steps:
                tree[i] -= 1
                i += i & -i
        i = step + 1
        while i <= steps:
            tree[i] += 1
            i += i & -i
        last[row] = step
    return histogram
