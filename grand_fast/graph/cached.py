"""The graph of whatever a model is given as one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph.checks import check_weight
from grand_fast.graph.edge_index import stored
from grand_fast.graph.fingerprint import fingerprint
from grand_fast.graph.graph import Graph

_KEPT = 4  # graphs of one tensor, of as many numbers of nodes


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


_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
