"""Peers from DGL, which is measured where it is installed: its fused sparse operators."""

import importlib
import importlib.util
import math
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from bench.core.problem import Competitor, Function, Problem, Shape, UnavailableError
from bench.peers.sparse import GraphArrays


def _library() -> ModuleType:
    if importlib.util.find_spec("dgl") is None:
        raise UnavailableError("DGL is not installed (https://www.dgl.ai/pages/start.html)")
    return importlib.import_module("dgl")


def _graph(dgl: ModuleType, problem: Problem) -> Any:
    arrays = GraphArrays(problem.graph)
    return dgl.graph((arrays.sender, arrays.receiver), num_nodes=arrays.n)


def _weights(dgl: ModuleType, graph: Any, q: Tensor, k: Tensor) -> Tensor:
    """Softmax over the senders of each receiver, [E, H], in slot order."""
    s = dgl.ops.u_dot_v(graph, k, q) / math.sqrt(q.shape[2])
    return dgl.nn.functional.edge_softmax(graph, s).squeeze(-1)


def attention_diffusion(problem: Problem) -> Function:
    """Projections, `u_dot_v`, `edge_softmax`, and one product with the mean over heads."""
    dgl, n, heads = _library(), problem.graph.num_nodes, problem.shape.heads
    graph = _graph(dgl, problem)

    def function(x: Tensor, w_q: Tensor, b_q: Tensor, w_k: Tensor, b_k: Tensor) -> Tensor:
        q, k = (linear(x, w, b).view(n, heads, -1) for w, b in ((w_q, b_q), (w_k, b_k)))
        a = _weights(dgl, graph, q, k).mean(1, keepdim=True)
        return dgl.ops.u_mul_e_sum(graph, x, a) - x

    return function


def csr_diffusion(problem: Problem) -> Function:
    """`u_mul_e_sum`."""
    dgl = _library()
    graph = _graph(dgl, problem)
    return lambda x, a: dgl.ops.u_mul_e_sum(graph, x, a[:, None]) - x


def edge_attention(problem: Problem) -> Function:
    """`u_dot_v` and `edge_softmax`."""
    dgl = _library()
    graph = _graph(dgl, problem)
    return lambda q, k: _weights(dgl, graph, q, k)


def _edge_floats(shape: Shape) -> int:
    return 6 * shape.heads + 4


PEERS = {
    "attention_diffusion": (Competitor("DGL", attention_diffusion, edge_floats=_edge_floats),),
    "csr_diffusion": (Competitor("DGL", csr_diffusion, edge_floats=_edge_floats),),
    "edge_attention": (Competitor("DGL", edge_attention, edge_floats=_edge_floats),),
}
