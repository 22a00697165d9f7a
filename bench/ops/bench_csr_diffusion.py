"""csr_diffusion with given weights, and its gradients by x and by the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

import grand_fast as gf
from bench.core.problem import OURS, Competitor, Function, Problem, Shape
from bench.peers.sparse import GraphArrays, Product, csr_product, sparse_products
from bench.peers.unfused import compiled_reference, index_add_diffusion, simple_conv
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.csr_diffusion.reference import cost, csr_diffusion_fwd


def setup(graph: gf.Graph, shape: Shape, *, seed: int = 0, element_bytes: int = 4) -> Problem:
    n, e, d = graph.num_nodes, graph.num_edges, shape.channels
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(e, generator=g) / graph.rowptr.diff().repeat_interleave(graph.rowptr.diff())

    def reference(csr: Csr, core: Sequence[Tensor]) -> Tensor:
        x, a = core
        return csr_diffusion_fwd(x, a, alpha=x.new_ones(d), beta=None, x0=None, csr=csr)

    return Problem(
        op="csr_diffusion",
        graph=graph,
        shape=shape,
        inputs={"x": torch.randn(n, d, generator=g), "a": a},
        d_out=torch.randn(n, d, generator=g),
        cost=cost(n=n, e=e, d=d, element_bytes=element_bytes),
        core=lambda x, a: (x * 1, a * 1),
        reference=reference,
    )


def ours(problem: Problem) -> Function:
    graph = problem.graph
    return lambda x, a: gf.ops.csr_diffusion(x, a, graph, edge_order="csr")


def _sparse(problem: Problem, product: Product) -> Function:
    arrays = GraphArrays(problem.graph)
    return lambda x, a: csr_product(x, a, arrays, product) - x


COMPETITORS = (
    Competitor(OURS, ours),
    *sparse_products(_sparse),
    Competitor("index_add", index_add_diffusion, lambda shape: 3 * shape.channels, slow=True),
    Competitor("PyG SimpleConv", simple_conv, lambda shape: 4 * shape.channels, slow=True),
    Competitor("torch.compile", compiled_reference, lambda shape: 3 * shape.channels,
               slow=True),
)  # fmt: skip
