"""attention_product: values, queries and keys per head, and all three gradients.

A head has `channels // H` values. Its peers write the weights, and most a row for each edge.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch_geometric.nn import TransformerConv

import grand_fast as gf
from bench.core.problem import OURS, Competitor, Function, Problem, Shape
from bench.peers.sampled import sampled_edge_attention
from bench.peers.sparse import GraphArrays, csr_product, mkl
from bench.peers.unfused import (
    Attention,
    compiled_reference,
    index_select_attention,
    released_attention,
)
from grand_fast.kernels.attention_product.reference import attention_product_fwd, cost
from grand_fast.kernels.csr import Csr


def setup(graph: gf.Graph, shape: Shape, *, seed: int = 0, element_bytes: int = 4) -> Problem:
    n, h, d = graph.num_nodes, shape.heads, max(1, shape.channels // shape.heads)
    g = torch.Generator().manual_seed(seed)
    std = 1.5  # scores with a spread of 2: a softmax neither flat nor one-hot
    q, k = (torch.randn(n, h, shape.d_k, generator=g) * std for _ in range(2))

    def reference(csr: Csr, core: Sequence[Tensor]) -> Tensor:
        return attention_product_fwd(*core, mean_heads=False, csr=csr)[0].flatten(1)

    return Problem(
        op="attention_product",
        graph=graph,
        shape=shape,
        inputs={"v": torch.randn(n, h, d, generator=g), "q": q, "k": k},
        d_out=torch.randn(n, h * d, generator=g),
        cost=cost(
            n=n, e=graph.num_edges, h=h, d=d, d_k=shape.d_k, element_bytes=element_bytes,
            mean_heads=False,
        ),
        core=lambda v, q, k: (v * 1, q * 1, k * 1),
        reference=reference,
        is_field=False,
    )  # fmt: skip


def ours(problem: Problem) -> Function:
    graph = problem.graph
    return lambda v, q, k: gf.ops.attention_product(v, q, k, graph, reduce="cat")


def two_operators(problem: Problem) -> Function:
    """Ours, the weights written between them."""
    graph = problem.graph

    def function(v: Tensor, q: Tensor, k: Tensor) -> Tensor:
        a = gf.ops.edge_attention(q, k, graph, edge_order="csr")
        return gf.ops.spmm(graph, a, v, edge_order="csr").flatten(1)

    return function


def gathered(attention: Callable[[Problem], Attention]) -> Callable[[Problem], Function]:
    """A row of values for each edge, times its weights, and their sums."""

    def make(problem: Problem) -> Function:
        weights, arrays = attention(problem), GraphArrays(problem.graph)

        def function(v: Tensor, q: Tensor, k: Tensor) -> Tensor:
            messages = weights(q, k)[:, :, None] * v.index_select(0, arrays.sender)
            return torch.zeros_like(v).index_add_(0, arrays.receiver, messages).flatten(1)

        return function

    return make


def sampled(problem: Problem) -> Function:
    """The weights as in `edge_attention`, and a sparse product for each head."""
    weights, arrays = sampled_edge_attention(problem), GraphArrays(problem.graph)

    def function(v: Tensor, q: Tensor, k: Tensor) -> Tensor:
        heads = zip(v.unbind(1), weights(q, k).unbind(1), strict=True)
        product = mkl(v.shape[2])
        parts = [csr_product(x.contiguous(), a.contiguous(), arrays, product) for x, a in heads]
        return torch.cat(parts, 1)

    return function


def transformer_conv(problem: Problem) -> Function:
    """PyG's `TransformerConv` after its projections: what its `propagate` computes."""
    shape, graph = problem.shape, problem.graph
    layer = TransformerConv(1, shape.d_k, heads=shape.heads, root_weight=False)
    edge_index = graph.edge_index()[:, graph.perm.long()]  # in slot order: receivers ascend

    def function(v: Tensor, q: Tensor, k: Tensor) -> Tensor:
        y: Tensor = layer.propagate(edge_index, query=q, key=k, value=v, edge_attr=None)
        return y.flatten(1)

    return function


def _gathered(shape: Shape) -> int:
    return 4 * shape.attention_channels + 3 * shape.channels


COMPETITORS = (
    Competitor(OURS, ours),
    Competitor("edge_attention, spmm", two_operators, lambda shape: 3 * shape.heads),
    Competitor("sampled_addmm + CSR", sampled, lambda shape: 8 * shape.heads + 6),
    Competitor("released sequence", gathered(released_attention), _gathered, slow=True),
    Competitor(
        "index_select + softmax(ptr)", gathered(index_select_attention), _gathered, slow=True
    ),
    Competitor("PyG TransformerConv", transformer_conv, _gathered, slow=True),
    Competitor("torch.compile", compiled_reference, _gathered, slow=True),
)
