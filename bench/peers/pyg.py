"""Peers from PyTorch Geometric."""

import torch
from torch import Tensor
from torch.func import functional_call
from torch_geometric.nn import TransformerConv
from torch_geometric.utils import spmm

from bench.peers.arrays import GraphArrays
from bench.problem import Function, Problem


def transformer_conv(problem: Problem) -> Function:
    """`TransformerConv`: the nearest layer. It projects the values too, and keeps the heads apart.

    Its output has d_att channels, so it is not compared with the reference.
    """
    shape = problem.shape
    layer = TransformerConv(shape.channels, shape.d_k, heads=shape.heads, root_weight=False)
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


def spmm_diffusion(problem: Problem) -> Function:
    """`torch_geometric.utils.spmm` on a torch.sparse CSR adjacency, as PyG's layers call it."""
    arrays = GraphArrays(problem.graph)

    def function(x: Tensor, a: Tensor) -> Tensor:
        adjacency = torch.sparse_csr_tensor(
            arrays.rowptr, arrays.sender, a, (arrays.n, arrays.n), check_invariants=False
        )
        return spmm(adjacency, x, reduce="sum") - x

    return function
