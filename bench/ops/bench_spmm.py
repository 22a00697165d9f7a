"""spmm: the product with one matrix, and its gradients by the values and by x."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.nn import SimpleConv

import grand_fast as gf
from bench.core.problem import OURS, Competitor, Function, Problem, Shape
from bench.peers.sparse import GraphArrays, Product, csr_product, sparse_products
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.spmm.reference import cost, spmm_fwd


def setup(graph: gf.Graph, shape: Shape, *, seed: int = 0, element_bytes: int = 4) -> Problem:
    n, e, d = graph.num_nodes, graph.num_edges, shape.channels
    g = torch.Generator().manual_seed(seed)

    def reference(csr: Csr, core: Sequence[Tensor]) -> Tensor:
        x, a = core
        return spmm_fwd(x[:, None], a[:, None], csr=csr)[:, 0]

    return Problem(
        op="spmm",
        graph=graph,
        shape=shape,
        inputs={"x": torch.randn(n, d, generator=g), "a": torch.rand(e, generator=g)},
        d_out=torch.randn(n, d, generator=g),
        cost=cost(n=n, e=e, h=1, d=d, element_bytes=element_bytes, shared=False),
        core=lambda x, a: (x * 1, a * 1),
        reference=reference,
        is_field=False,
    )


def ours(problem: Problem) -> Function:
    return lambda x, a: gf.ops.spmm(problem.graph, a, x, edge_order="csr")


def _sparse(problem: Problem, product: Product) -> Function:
    arrays = GraphArrays(problem.graph)
    return lambda x, a: csr_product(x, a, arrays, product)


def gathered(problem: Problem) -> Function:
    """As `torch_sparse.spmm` computes it: a row for each edge, and their sums."""
    arrays = GraphArrays(problem.graph)

    def function(x: Tensor, a: Tensor) -> Tensor:
        messages = a[:, None] * x.index_select(0, arrays.sender)
        return torch.zeros_like(x).index_add_(0, arrays.receiver, messages)

    return function


def simple_conv(problem: Problem) -> Function:
    """`SimpleConv`, PyG's weighted sum over senders; its edges in slot order, as the weights are.

    PyG's `spmm` is no peer: its gradient by the weights passes through a dense [N, N] matrix.
    """
    layer, graph = SimpleConv(aggr="sum"), problem.graph
    edge_index = graph.edge_index()[:, graph.perm.long()]
    return lambda x, a: layer(x, edge_index, a)


COMPETITORS = (
    Competitor(OURS, ours),
    *sparse_products(_sparse),
    Competitor("gather and index_add", gathered, lambda shape: 3 * shape.channels, slow=True),
    Competitor("PyG SimpleConv", simple_conv, lambda shape: 4 * shape.channels, slow=True),
)
