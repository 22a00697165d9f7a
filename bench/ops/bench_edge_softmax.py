"""edge_softmax over the senders of each receiver, of given scores, and the gradient by them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.utils import softmax

import grand_fast as gf
from bench.core.problem import OURS, Competitor, Function, Problem, Shape
from bench.peers.sparse import GraphArrays
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.edge_softmax.reference import cost, edge_softmax_fwd
from grand_fast.kernels.weighting import Weighting


def setup(graph: gf.Graph, shape: Shape, *, seed: int = 0, element_bytes: int = 4) -> Problem:
    n, e, h = graph.num_nodes, graph.num_edges, shape.heads
    g = torch.Generator().manual_seed(seed)

    def reference(csr: Csr, core: Sequence[Tensor]) -> Tensor:
        return edge_softmax_fwd(core[0], weighting=Weighting(1.0), csr=csr)[0]

    return Problem(
        op="edge_softmax",
        graph=graph,
        shape=shape,
        inputs={"scores": 2.0 * torch.randn(e, h, generator=g)},
        d_out=torch.randn(e, h, generator=g),
        cost=cost(n=n, e=e, h=h, element_bytes=element_bytes),
        core=lambda scores: (scores * 1,),
        reference=reference,
        edge_output=True,
        gathers=False,
    )


def ours(problem: Problem) -> Function:
    return lambda scores: gf.ops.edge_softmax(scores, problem.graph, edge_order="csr")


def by_index(problem: Problem) -> Function:
    """PyG's, as layers and the released code call it."""
    arrays = GraphArrays(problem.graph)
    return lambda scores: softmax(scores, arrays.receiver, num_nodes=arrays.n)


def by_rowptr(problem: Problem) -> Function:
    """PyG's over sorted rows: torch.segment_reduce."""
    rowptr = GraphArrays(problem.graph).rowptr
    return lambda scores: softmax(scores, ptr=rowptr)


COMPETITORS = (
    Competitor(OURS, ours),
    Competitor("PyG softmax(ptr)", by_rowptr, lambda shape: 5 * shape.heads),
    Competitor("PyG softmax(index)", by_index, lambda shape: 5 * shape.heads),
)
