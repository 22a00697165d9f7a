"""The graph in the forms that the peers take it, made once per graph and not timed."""

from functools import cached_property

import torch
from torch import Tensor

from grand_fast import Graph


class GraphArrays:
    """Edge `e` is slot `e` of the CSR of `A` throughout."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.n, self.e = graph.num_nodes, graph.num_edges

    @cached_property
    def receiver(self) -> Tensor:
        """[E], int64, ascending."""
        nodes = torch.arange(self.n, device=self.graph.device)
        return torch.repeat_interleave(nodes, self.graph.rowptr.diff(), output_size=self.e)

    @cached_property
    def sender(self) -> Tensor:
        """[E], int64."""
        return self.graph.col.long()

    @cached_property
    def rowptr(self) -> Tensor:
        """[N+1], int64."""
        return self.graph.rowptr.long()

    def matrix(self, a: Tensor) -> Tensor:
        """`A` with values `a [E]`, as torch.sparse CSR with the graph's own (int32) indices."""
        graph = self.graph
        return _csr(graph.rowptr, graph.col, a, self.n)

    def transposed(self, a: Tensor) -> Tensor:
        """`Aᵀ` with values `a [E]`, likewise."""
        graph = self.graph
        return _csr(graph.rowptr_t, graph.col_t, a.index_select(0, graph.perm_t), self.n)


def _csr(rowptr: Tensor, col: Tensor, values: Tensor, n: int) -> Tensor:
    return torch.sparse_csr_tensor(rowptr, col, values, (n, n), check_invariants=False)
