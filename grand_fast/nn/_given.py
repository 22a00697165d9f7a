"""What a layer is given: the state of the nodes, and the edges between them."""

from typing import Any

import torch
from torch import Tensor

from grand_fast.graph import Graph, cached_graph
from grand_fast.ops.backends import (
    check_untraced,
    is_mapped,
    outside_transforms,
    transforms_active,
    unwrapped,
)
from grand_fast.ops.checks import BATCH_REMEDY


def check_state(
    module: str,
    x: Any,
    letters: str,
    channels: int | None = None,
    *,
    any_shape: bool = False,
    like: Tensor | None = None,
) -> None:
    """`x` is floating and of two axes unless `any_shape`; of `channels` columns if that is known.

    like: a weight it is dense and of one type with, unless autocast brings them to one.

    Raises:
        NotImplementedError: a pair for the two sides of a bipartite graph. TypeError, ValueError.
    """
    if isinstance(x, tuple | list):
        raise NotImplementedError(
            f"{module}: `x` must be one Tensor {letters}, got a {type(x).__name__} of {len(x)}: "
            "senders and receivers share a state. Use HeteroConv with one for each relation within "
            "a type of nodes, or join the types into one graph by HeteroData.to_homogeneous()."
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"{module}: `x` must be a Tensor {letters}, got {type(x).__name__}.")
    if any_shape:
        return
    if not x.is_floating_point():
        raise TypeError(f"{module}: `x` must be floating, got {x.dtype}. Try .float().")
    if x.dim() != 2 or (channels is not None and x.shape[1] != channels):
        sizes = "" if channels is None else f" = [N, {channels}]"
        remedy = f" {BATCH_REMEDY}" if x.dim() > 2 else ""
        raise ValueError(
            f"{module}: `x` must have shape {letters}{sizes}, got {list(x.shape)}.{remedy}"
        )
    if like is None or not like.is_floating_point():
        return
    if x.layout is not torch.strided:
        raise TypeError(f"{module}: `x` must be dense, got {x.layout}. Try .to_dense().")
    if x.device != like.device:
        raise ValueError(
            f"{module}: `x` must be on {like.device} as the layer is, got {x.device}. "
            f"Move it with .to('{like.device}')."
        )
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{module}: `x` must be {like.dtype} as the layer is, got {x.dtype}. Convert it with "
            f".to({like.dtype}), or the layer with .to({x.dtype})."
        )


def graph_of(module: str, edges: Any, num_nodes: int) -> Graph:
    """The graph of whatever a layer is given as one, which is no part of what is differentiated.

    Raises:
        NotImplementedError: it would be part of a program, or is one of a batch.
    """
    if isinstance(edges, Graph):
        return edges
    if torch.compiler.is_exporting():
        got = "a Tensor" if isinstance(edges, Tensor) else type(edges).__name__
        raise NotImplementedError(
            f"{module}: `edge_index` must be a Graph in an exported program, got {got}. Build it "
            "with Graph.from_edge_index(edge_index, num_nodes) and export with that in its place."
        )
    if torch.compiler.is_compiling():
        return cached_graph(edges, num_nodes)
    check_untraced(module)
    if not transforms_active() or not isinstance(edges, Tensor):
        return cached_graph(edges, num_nodes)
    if is_mapped(edges):
        raise NotImplementedError(
            f"{module}: `edge_index` must be the same throughout torch.func.vmap, got a batch. "
            "Call it for each, or join the graphs as torch_geometric.data.Batch does."
        )
    if edges.is_floating_point() and edges is not unwrapped(edges):
        return cached_graph(edges, num_nodes)  # a matrix whose values are differentiated
    with outside_transforms():  # so that it is kept, as anywhere
        return cached_graph(unwrapped(edges), num_nodes)
