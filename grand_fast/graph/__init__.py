"""`Graph`: the edges as CSR of `A` and of `Aᵀ`, sorted and validated once, on construction.

Row `i` of `A` lists the senders of receiver `i`, so `y = A x` needs nothing transposed. This folder
is the only place where the user's `edge_index` is turned into that layout.
"""

from grand_fast.graph import registration  # noqa: F401  # tells torch of the class
from grand_fast.graph.cached import cached_graph
from grand_fast.graph.fingerprint import fingerprint
from grand_fast.graph.graph import Graph

__all__ = ["Graph", "cached_graph", "fingerprint"]
