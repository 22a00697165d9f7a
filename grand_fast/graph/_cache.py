"""The graph of whatever a model is given as one."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph._graph import Graph
from grand_fast.graph._input import weight_of


def cached_graph(given: Any, num_nodes: int) -> Graph:
    """A `Graph` itself; of any other form of edges, source to target, their graph.

    That of a tensor is kept while the tensor lives unchanged. The values of a matrix are read at
    each call: they may change unseen, and with them would be kept what they are computed from.
    """
    if isinstance(given, Graph):
        return given
    # An inference tensor has no version counter: a change would go unseen
    if not isinstance(given, Tensor) or given.is_inference():
        return Graph.from_edge_index(given, num_nodes)
    key = (given._version, num_nodes)
    known: tuple[Any, Graph] | None = _graphs.get(given)  # type: ignore[no-untyped-call]
    if known is None or known[0] != key:
        graph = Graph.from_edge_index(given, num_nodes)
        known = _graphs[given] = (key, graph.with_edge_weight(None))
    if given.layout is torch.strided:
        return known[1]
    return known[1].with_edge_weight(weight_of(given))


_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
