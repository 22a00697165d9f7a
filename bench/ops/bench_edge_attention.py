"""edge_attention: the weights of all heads from given queries and keys, and both gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

import grand_fast as gf
from bench.core.problem import OURS, Competitor, Function, Problem, Shape
from bench.peers.sampled import sampled_edge_attention
from bench.peers.unfused import compiled_reference, index_select_attention, released_attention
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.edge_attention.reference import cost, edge_attention_fwd


def setup(graph: gf.Graph, shape: Shape, *, seed: int = 0, element_bytes: int = 4) -> Problem:
    n, e = graph.num_nodes, graph.num_edges
    g = torch.Generator().manual_seed(seed)
    std = 1.5  # scores with a spread of 2: a softmax neither flat nor one-hot

    def normal() -> Tensor:
        return torch.randn(n, shape.heads, shape.d_k, generator=g) * std

    def reference(csr: Csr, core: Sequence[Tensor]) -> Tensor:
        return edge_attention_fwd(*core, mean_heads=False, csr=csr)[0]

    return Problem(
        op="edge_attention",
        graph=graph,
        shape=shape,
        inputs={"q": normal(), "k": normal()},
        d_out=torch.randn(e, shape.heads, generator=g),
        cost=cost(n=n, e=e, h=shape.heads, d_k=shape.d_k, element_bytes=element_bytes),
        core=lambda q, k: (q * 1, k * 1),
        reference=reference,
        edge_output=True,
    )


def ours(problem: Problem) -> Function:
    graph = problem.graph
    return lambda q, k: gf.ops.edge_attention(q, k, graph, edge_order="csr")


def _gathered(shape: Shape) -> int:
    return 4 * shape.attention_channels


COMPETITORS = (
    Competitor(OURS, ours, lambda shape: 2 * shape.heads),
    Competitor("sampled_addmm + CSR", sampled_edge_attention, lambda shape: 4 * shape.heads + 6),
    Competitor("released sequence", released_attention, _gathered, slow=True),
    Competitor("index_select + softmax(ptr)", index_select_attention, _gathered, slow=True),
    Competitor("torch.compile", compiled_reference, _gathered, slow=True),
)
