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
from grand_fast.kernels.attention_diffusion.reference import attention_diffusion_fwd
from grand_fast.kernels.csr_diffusion.reference import csr_diffusion_fwd
from grand_fast.kernels.edge_attention.reference import edge_attention_fwd

Attention = Callable[[Tensor, Tensor], Tensor]


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
        n, heads = arrays.n, problem.shape.heads

        def function(x: Tensor, w_q: Tensor, b_q: Tensor, w_k: Tensor, b_k: Tensor) -> Tensor:
            q, k = (linear(x, w, b).view(n, heads, -1) for w, b in ((w_q, b_q), (w_k, b_k)))
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


def compiled_attention_diffusion(problem: Problem) -> Function:
    """torch.compile of the reference, projections included."""
    csr, n, heads = problem.graph.csr(), problem.graph.num_nodes, problem.shape.heads
    alpha = torch.ones(problem.shape.channels, device=problem.graph.device)

    def function(x: Tensor, w_q: Tensor, b_q: Tensor, w_k: Tensor, b_k: Tensor) -> Tensor:
        q, k = (linear(x, w, b).view(n, heads, -1) for w, b in ((w_q, b_q), (w_k, b_k)))
        return attention_diffusion_fwd(x, q, k, alpha=alpha, beta=None, x0=None, csr=csr)[0]

    return compiled(function)


def compiled_edge_attention(problem: Problem) -> Function:
    """torch.compile of the reference."""
    csr = problem.graph.csr()
    return compiled(lambda q, k: edge_attention_fwd(q, k, mean_heads=False, csr=csr)[0])


def compiled_csr_diffusion(problem: Problem) -> Function:
    """torch.compile of the reference."""
    csr = problem.graph.csr()
    alpha = torch.ones(problem.shape.channels, device=problem.graph.device)
    return compiled(lambda x, a: csr_diffusion_fwd(x, a, alpha=alpha, beta=None, x0=None, csr=csr))


def transformer_conv(problem: Problem) -> Function:
    """`TransformerConv`: the nearest layer. It projects the values too, and keeps the heads apart.

    Its output has d_att channels, so it is not compared with the reference.
    """
    shape = problem.shape
    layer = TransformerConv(shape.channels, shape.d_k, heads=shape.heads, root_weight=False)
    layer = layer.to(problem.graph.device)
    edge_index = problem.graph.edge_index()

    def function(x: Tensor, w_q: Tensor, b_q: Tensor, w_k: Tensor, b_k: Tensor) -> Tensor:
        parameters = {
            "lin_query.weight": w_q,
            "lin_query.bias": b_q,
            "lin_key.weight": w_k,
            "lin_key.bias": b_k,
        }
        return functional_call(layer, parameters, (x, edge_index))

    return function


def simple_conv(problem: Problem) -> Function:
    """`csr_diffusion` by `SimpleConv`, PyG's weighted sum over senders.

    PyG's `spmm` is no peer: its gradient by the weights passes through a dense [N, N] matrix.
    """
    layer, edge_index = SimpleConv(aggr="sum"), problem.graph.edge_index()
    slots = problem.graph.perm.long()
    edge_index = edge_index[:, slots]  # in slot order, as the weights are
    return lambda x, a: layer(x, edge_index, a) - x


def compiled(function: Function) -> Function:
    """torch.compile, or why it is not to be had."""
    if not has_compiler():
        raise UnavailableError("torch.compile needs a C++ compiler on the PATH (g++ or clang++)")
    torch._dynamo.reset()  # else the shapes of earlier problems count towards its recompile limit
    return torch.compile(function)


def has_compiler() -> bool:
    """Whether torch.compile can build its CPU kernels."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
