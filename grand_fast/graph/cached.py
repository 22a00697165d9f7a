"""The graph of whatever a model is given as one, kept while the edges are the same."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph.checks import check_weight
from grand_fast.graph.edge_index import stored
from grand_fast.graph.graph import Graph

_KEPT = 4  # graphs of one tensor, of as many numbers of nodes

_COLUMNS = 1 << 12  # random numbers that a pass over the ids reads again and again: 32 KiB


class _Known(NamedTuple):
    edges: tuple[int, ...]  # how many ids, and their fingerprint
    graphs: dict[int, Graph]  # without weights, by the number of nodes; used last comes last


def cached_graph(given: Any, num_nodes: int) -> Graph:
    """A `Graph` itself; of any other form of edges, source to target, their graph.

    That of a tensor is kept while the tensor lives and holds the same edges in the same order,
    which a fingerprint of them tells on each call: version counters miss what is written through
    `.data`, an array that shares the memory, or the tensor inside of an `EdgeIndex`. That is a pass
    over the ids, 1 % of building the graph, and on a GPU the host waits for one number: pass a
    `Graph` where that counts. The values of a sparse matrix are taken anew each time.
    """
    if isinstance(given, Graph):
        return given
    if not isinstance(given, Tensor) or given.is_meta:
        return Graph.from_edge_index(given, num_nodes)
    ids, weight = stored(given)
    known: _Known | None = _graphs.get(given)  # type: ignore[no-untyped-call]
    # A CUDA graph under capture can read nothing, and will replay on these edges whatever comes
    can_read = not (given.is_cuda and torch.cuda.is_current_stream_capturing())
    if known is None or can_read:
        edges = *(t.numel() for t in ids), int(fingerprint(*ids))
        if known is None or known.edges != edges:
            known = _graphs[given] = _Known(edges, {})
    graph = known.graphs.pop(num_nodes, None)
    if graph is None:
        graph = Graph.from_edge_index(given, num_nodes).with_edge_weight(None)
        if len(known.graphs) == _KEPT:
            del known.graphs[next(iter(known.graphs))]
    known.graphs[num_nodes] = graph
    if weight is None:
        return graph
    check_weight(weight, graph.col, validate=can_read)
    return graph.with_edge_weight(weight)


def fingerprint(*arrays: Tensor) -> Tensor:
    """Of tensors of ids `[…]`, at least one, a scalar int64 on their device; a pass over each.

    The sum modulo 2⁶⁴ of every id times a random odd number that belongs to its place, so that the
    order counts. One id that changes always changes it; several, or two that change places, all
    but once in 2³² times while ids are below 2³¹. How many ids there are it does not tell.
    """
    parts = []
    for number, array in enumerate(arrays):
        flat = array.reshape(1, -1).long()
        whole = flat.shape[1] - flat.shape[1] % _COLUMNS
        parts.append(_product(flat[:, whole:], seed=2 * number + 1))
        if whole:
            rows = _product(flat[0, :whole].view(-1, _COLUMNS), seed=0)
            parts.append(_product(rows[None], seed=2 * number + 2))
    return torch.stack(parts).sum()


def _product(table: Tensor, *, seed: int) -> Tensor:
    """The products of the rows with random odd numbers."""
    vector = torch.from_numpy(_odd(table.shape[1], seed)).to(table.device)
    if table.device.type == "cpu":
        return table.mv(vector)
    return (table * vector).sum(1)  # elsewhere torch multiplies no matrix of integers


@lru_cache(maxsize=64)
def _odd(n: int, seed: int) -> NDArray[np.int64]:
    # No tensor: one made while a program is traced would be of no use to the next call
    numbers: NDArray[np.int64] = np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, n)
    return 2 * numbers + 1


_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
