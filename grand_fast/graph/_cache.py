"""The graph of whatever a model is given as one."""

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph._graph import Graph


def cached_graph(given: Any, num_nodes: int) -> Graph:
    """A `Graph` itself; of any other form of edges, source to target, their graph.

    That of a tensor is kept while the tensor lives unchanged.
    """
    if isinstance(given, Graph):
        return given
    # An inference tensor has no version counter: a change would go unseen
    if not isinstance(given, Tensor) or given.is_inference():
        return Graph.from_edge_index(given, num_nodes)
    key = (given._version, num_nodes)
    known: tuple[Any, Graph] | None = _graphs.get(given)  # type: ignore[no-untyped-call]
    if known is None or known[0] != key:
        known = _graphs[given] = (key, Graph.from_edge_index(given, num_nodes))
    return known[1]


_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
