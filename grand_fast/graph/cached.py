"""The graph of whatever a model is given as one, kept while the edges are the same."""

from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, UntypedStorage
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph.checks import check_weight
from grand_fast.graph.edge_index import Flow, edges_of, stored
from grand_fast.graph.graph import Graph

_KEPT = 4  # views of one tensor, and graphs of one view: for numbers of nodes, and directions

_COLUMNS = 1 << 12  # random numbers that a pass over the ids reads again and again: 32 KiB


class _Known(NamedTuple):
    edges: tuple[int, ...]  # how many ids, and their fingerprint
    graphs: dict[tuple[int, Flow, bool], Graph]  # without weights; used last comes last


def graph_of(edge_index: Any, num_nodes: int, *, flow: Flow = "source_to_target") -> Graph:
    """The graph of an edge index, built once and then kept as long as its memory lives.

    For code that is handed an edge index in each call, and cannot hold a `Graph` itself. Never
    stale: a fingerprint of the edges is taken in each call, and whatever changed them is seen, also
    what no version counter counts: writes through `.data`, through an array of NumPy, in inference
    mode. That is a pass over the ids, 1 % of building the graph; on a GPU the host waits for it.

    Args:
        edge_index: integer tensor `[2, E]`, or anything else that `Graph.from_edge_index` takes. It
            is known by its memory and its place there, so that a view may be made anew in each
            call: `edges[:, :k]`, `pairs.t()`, `edges.detach()`. A `Graph` is returned as it is.
        num_nodes: `N`.
        flow: as in PyG and `Graph.from_edge_index`: who sends, row 0 or row 1.

    Returns:
        The graph that `Graph.from_edge_index` makes of these edges; of a matrix with its values.

    Raises:
        TypeError, ValueError: as `Graph.from_edge_index`.
    """
    return cached_graph(edge_index, num_nodes, flow)


def cached_graph(
    given: Any, num_nodes: int, flow: Flow = "source_to_target", *, one_loop_each: bool = False
) -> Graph:
    """A `Graph` itself; of any other form of edges their graph.

    With `one_loop_each` the graph of a tensor has no weights and, in place of the loops among its
    edges, one for each node, after the others: what PyG's `remove_self_loops` and `add_self_loops`
    make.

    That of a tensor is kept while the tensor lives and holds the same edges in the same order,
    which a fingerprint of them tells on each call: version counters miss what is written through
    `.data`, an array that shares the memory, or the tensor inside of an `EdgeIndex`. That is a pass
    over the ids, 1 % of building the graph, and on a GPU the host waits for one number: pass a
    `Graph` where that counts. The values of a sparse matrix are taken anew each time.
    """
    if isinstance(given, Graph):
        return given
    if not isinstance(given, Tensor) or given.is_meta:
        return Graph.from_edge_index(given, num_nodes, flow=flow)
    ids, weight = stored(given)
    views, place = _views_of(given)
    known = views.pop(place, None)
    # A CUDA graph under capture can read nothing, and will replay on these edges whatever comes
    can_read = not (given.is_cuda and torch.cuda.is_current_stream_capturing())
    if known is None or can_read:
        edges = *(t.numel() for t in ids), int(fingerprint(*ids))
        if known is None or known.edges != edges:
            known = _Known(edges, {})
    _keep(views, place, known)
    key = num_nodes, flow, one_loop_each
    graph = known.graphs.pop(key, None)
    if graph is None and one_loop_each:
        graph = Graph.from_edge_index(_one_loop_each(given, num_nodes, flow), num_nodes)
    elif graph is None:
        graph = Graph.from_edge_index(given, num_nodes, flow=flow).with_edge_weight(None)
    _keep(known.graphs, key, graph)
    if weight is None or one_loop_each:
        return graph
    check_weight(weight, graph.col, validate=can_read)
    return graph.with_edge_weight(weight)


def _one_loop_each(given: Any, num_nodes: int, flow: Flow) -> Tensor:
    receiver, sender, *_ = edges_of(given, flow, num_nodes)
    others, nodes = sender != receiver, torch.arange(num_nodes, device=sender.device)
    return torch.stack([torch.cat([ids[others], nodes]) for ids in (sender, receiver)])


def _views_of(given: Tensor) -> tuple[dict[Any, _Known], Any]:
    """What is known of views of the same memory, and where in it this one lies."""
    if type(given) is not Tensor or given.layout is not torch.strided:
        return _graphs.setdefault(given, {}), None  # type: ignore[no-untyped-call]
    place = given.dtype, given.storage_offset(), given.shape, given.stride()
    return _of_memory.setdefault(given.untyped_storage(), {}), place


def _keep(table: dict[Any, Any], key: Any, value: Any) -> None:
    """Enter what is used last, in place of what was used longest ago."""
    for oldest in list(table)[: 1 - _KEPT]:  # several, after threads that entered one each
        table.pop(oldest, None)
    table[key] = value


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


_of_memory: WeakKeyDictionary[UntypedStorage, dict[Any, _Known]] = WeakKeyDictionary()
_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of matrices and subclasses
