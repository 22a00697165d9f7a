"""Peers from DGL, which is measured where it is installed: its fused sparse operators."""

import importlib
import importlib.util
import math
from types import ModuleType
from typing import Any

from torch import Tensor

from bench.core.problem import Competitor, Function, Problem, UnavailableError
from bench.peers.sparse import GraphArrays
from bench.peers.unfused import projected


def _library() -> ModuleType:
    if importlib.util.find_spec("dgl") is None:
        raise UnavailableError("DGL is not installed (https://www.dgl.ai/pages/start.html)")
    return importlib.import_module("dgl")


def _graph(dgl: ModuleType, problem: Problem) -> Any:
    arrays = GraphArrays(problem.graph)
    return dgl.graph((arrays.sender, arrays.receiver), num_nodes=arrays.n)


def attention_diffusion(problem: Problem) -> Function:
    """Projections, `edge_attention`, and one product with the mean over heads."""
    dgl, weights = _library(), edge_attention(problem)
    graph = _graph(dgl, problem)

    def function(x: Tensor, *projections: Tensor) -> Tensor:
        a = weights(*projected(problem.shape.heads, x, *projections)).mean(1, keepdim=True)
        return dgl.ops.u_mul_e_sum(graph, x, a) - x

    return function


def csr_diffusion(problem: Problem) -> Function:
    """`u_mul_e_sum`."""
    dgl = _library()
    graph = _graph(dgl, problem)
    return lambda x, a: dgl.ops.u_mul_e_sum(graph, x, a[:, None]) - x


def edge_attention(problem: Problem) -> Function:
    """`u_dot_v` and `edge_softmax` over the senders of each receiver, [E, H], in slot order."""
    dgl = _library()
    graph = _graph(dgl, problem)

    def function(q: Tensor, k: Tensor) -> Tensor:
        s = dgl.ops.u_dot_v(graph, k, q) / math.sqrt(q.shape[2])
        return dgl.nn.functional.edge_softmax(graph, s).squeeze(-1)

    return function


PEERS = {
    function.__name__: (Competitor("DGL", function, lambda shape: 6 * shape.heads + 4),)
    for function in (attention_diffusion, csr_diffusion, edge_attention)
}
