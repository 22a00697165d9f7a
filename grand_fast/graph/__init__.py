"""`Graph`: the edges as CSR of `A` and of `Aᵀ`, sorted and validated once, on construction.

Row `i` of `A` lists the senders of receiver `i`, so `y = A x` needs nothing transposed. This folder
is the only place where the user's `edge_index` is turned into that layout.
"""

from typing import Any

import torch
from torch.utils import _pytree as pytree

from grand_fast.graph.cached import cached_graph, fingerprint, graph_of
from grand_fast.graph.graph import Graph

__all__ = ["Graph", "cached_graph", "fingerprint", "graph_of"]


def _flatten_with_keys(graph: Graph) -> tuple[list[Any], Any]:
    # As keys of a mapping: export confuses attributes of which one name begins with another's.
    names = ("rowptr", "col", "rowptr_t", "col_t", "perm", "perm_t", "edge_weight")
    return [(pytree.MappingKey(name), getattr(graph, name)) for name in names], None


# An argument of an exported program. The public name of this, in torch.export, is slow to import.
pytree.register_pytree_node(
    Graph,
    lambda graph: ([*graph._arrays(), graph.edge_weight], None),
    lambda children, _: Graph(*children),
    serialized_type_name="grand_fast.Graph",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([Graph])  # it holds tensors alone
