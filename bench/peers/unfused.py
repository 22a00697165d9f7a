"""Peers that write a row per edge: the released code, index_select, torch.compile and PyG."""

import math
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear
from torch_geometric.nn import SimpleConv, TransformerConv
from torch_geometric.utils import softmax

from bench.core.problem import Function, Problem, UnavailableError
from bench.peers.sparse import GraphArrays, csr_product, mkl

Attention = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


def projected(heads: int, x: Tensor, w_q: Tensor, b_q: Tensor, w_k: Tensor, b_k: Tensor) -> Pair:
    """Queries and keys, `[N, H, d_k]` each, by a product each."""
    q, k = (linear(x, w, b).view(len(x), heads, -1) for w, b in ((w_q, b_q), (w_k, b_k)))
    return q, k


def released_attention(problem: Problem) -> Attention:
    """Edge attention as GRAND's released code writes it: advanced indexing, PyG softmax."""
    arrays = GraphArrays(problem.graph)
    receiver, sender, n = arrays.receiver, arrays.sender, arrays.n

    def attention(q: Tensor, k: Tensor) -> Tensor:
        s = (q[receiver] * k[sender]).sum(2) / math.sqrt(q.shape[2])
        return softmax(s, receiver, num_nodes=n)

    return attention


def index_select_attention(problem: Problem) -> Attention:
    """The same by `index_select`, whose backward is faster, and a softmax over sorted rows."""
    arrays = GraphArrays(problem.graph)
    receiver, sender, rowptr = arrays.receiver, arrays.sender, arrays.rowptr

    def attention(q: Tensor, k: Tensor) -> Tensor:
        s = (q.index_select(0, receiver) * k.index_select(0, sender)).sum(2)
        return softmax(s / math.sqrt(q.shape[2]), ptr=rowptr)

    return attention


def diffusion_by(attention: Callable[[Problem], Attention]) -> Callable[[Problem], Function]:
    """Attention, its mean over heads, and one sparse product.

    The released code's product is torch_sparse's, which gathers a row per edge once more; MKL's
    stands in for it here, to its advantage.
    """

    def make(problem: Problem) -> Function:
        weights, arrays = attention(problem), GraphArrays(problem.graph)

        def function(x: Tensor, *projections: Tensor) -> Tensor:
            q, k = projected(problem.shape.heads, x, *projections)
            return csr_product(x, weights(q, k).mean(1), arrays, mkl(x.shape[1])) - x

        return function

    return make


def index_add_diffusion(problem: Problem) -> Function:
    """`csr_diffusion` by gather, multiply and `index_add`."""
    arrays = GraphArrays(problem.graph)

    def function(x: Tensor, a: Tensor) -> Tensor:
        messages = a[:, None] * x.index_select(0, arrays.sender)
        return torch.zeros_like(x).index_add_(0, arrays.receiver, messages) - x

    return function


def eager_reference(problem: Problem) -> Function:
    """Our reference as it stands, projections included."""
    csr = problem.graph.csr()
    return lambda *inputs: problem.reference(csr, problem.core(*inputs))


def compiled_reference(problem: Problem) -> Function:
    """torch.compile of it, or why that is not to be had."""
    if not has_compiler():
        raise UnavailableError("torch.compile needs a C++ compiler on the PATH (g++ or clang++)")
    torch._dynamo.reset()  # else the shapes of earlier problems count towards its recompile limit
    return torch.compile(eager_reference(problem))


def transformer_conv(problem: Problem) -> Function:
    """`TransformerConv`: the nearest layer. It projects the values too, and keeps the heads apart.

    Its output has d_att channels, so it is not compared with the reference.
    """
    shape = problem.shape
    layer = TransformerConv(shape.channels, shape.d_k, heads=shape.heads, root_weight=False)
    layer = layer.to(problem.graph.device)
    edge_index = problem.graph.edge_index()

    names = [f"lin_{name}.{part}" for name in ("query", "key") for part in ("weight", "bias")]
    return lambda x, *projections: functional_call(
        layer, dict(zip(names, projections, strict=True)), (x, edge_index)
    )


def simple_conv(problem: Problem) -> Function:
    """`csr_diffusion` by `SimpleConv`, PyG's weighted sum over senders.

    PyG's `spmm` is no peer: its gradient by the weights passes through a dense [N, N] matrix.
    """
    layer, graph = SimpleConv(aggr="sum"), problem.graph
    edge_index = graph.edge_index()[:, graph.perm.long()]  # in slot order, as the weights are
    return lambda x, a: layer(x, edge_index, a) - x


def has_compiler() -> bool:
    """Whether torch.compile can build its CPU kernels."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
