"""The graph of an edge index, and products with it: the one place that calls our operators."""

import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor

from grand_fast.graph import Graph, fingerprint
from grand_fast.ops import spmm
from grand_fast.ops.edge_attention import EdgeOrder

_KEPT = 16  # graphs; a rewiring makes one in each epoch


class _Seen(NamedTuple):
    """An edge index of which the graph is known, while nothing is written to it."""

    edges: weakref.ref[Tensor]
    version: int
    address: int
    graph: Graph


_by_edges: OrderedDict[tuple[object, ...], Graph] = OrderedDict()
_by_tensor: OrderedDict[tuple[int, int], _Seen] = OrderedDict()


def graph_of(edge_index: Tensor, num_nodes: int) -> Graph:
    """The graph whose row 0 receives, built once for the same edges in the same order.

    A tensor that was seen before is known by its version counter, so a write to it is noticed,
    but for one through `.data` or an array that shares its memory; a new tensor is compared by a
    pass over its ids.

    Raises:
        TypeError, ValueError: these are no edges of such a graph.
    """
    key = id(edge_index), num_nodes
    seen = _by_tensor.get(key)
    has_version = not edge_index.is_inference()
    if seen is not None and has_version and seen.edges() is edge_index:  # noqa: SIM102
        if (seen.version, seen.address) == (edge_index._version, edge_index.data_ptr()):
            return seen.graph
    found = int(fingerprint(edge_index))
    edges = (tuple(edge_index.shape), found, num_nodes, edge_index.device)
    graph = _by_edges.pop(edges, None)
    if graph is None:
        graph = Graph.from_edge_index(edge_index, num_nodes, flow="target_to_source")
    _keep(_by_edges, edges, graph)
    if has_version:
        address = edge_index.data_ptr()
        ref = weakref.ref(edge_index)
        _by_tensor.pop(key, None)
        _keep(_by_tensor, key, _Seen(ref, edge_index._version, address, graph))
    return graph


def _keep(table: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    table[key] = value
    if len(table) > _KEPT:
        table.popitem(last=False)


def forget() -> None:
    """Let go of all graphs."""
    _by_edges.clear()
    _by_tensor.clear()


def product(values: Tensor, x: Tensor, graph: Graph, *, edge_order: EdgeOrder = "user") -> Tensor:
    """`A x` of weights `[E]`."""
    return spmm(graph, values, x, edge_order=edge_order)
