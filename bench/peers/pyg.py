"""Peers from PyTorch Geometric."""

from torch import Tensor
from torch.func import functional_call
from torch_geometric.nn import SimpleConv, TransformerConv

from bench.core.problem import Function, Problem


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
