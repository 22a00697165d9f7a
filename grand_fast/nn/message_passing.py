"""What PyG's attention layers share here: when our operators may stand in, and what they compute.

A layer computes as PyG's own code does, by that code, wherever these say that ours would not.
"""

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import SumAggregation

from grand_fast.graph import Graph, cached_graph
from grand_fast.nn._layers import is_silent
from grand_fast.ops import attention_product, edge_attention, spmm
from grand_fast.ops.backends import unusual
from grand_fast.ops.edge_attention import to_slots
from grand_fast.ops.scores import AbstractScore

# What a subclass, or one layer, may have of its own in place of PyG's
_PARTS = ("message", "aggregate", "update", "edge_update", "message_and_aggregate", "propagate",
          "edge_updater", "explain_message")  # fmt: skip
_HOOKS = tuple(
    f"_{part}_forward{when}_hooks"
    for part in ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
    for when in ("_pre", "")
)
_log = logging.getLogger("grand_fast")


def graph_for(
    layer: MessagePassing,
    x: Any,
    edge_index: Any,
    edge_attr: Any,
    *,
    whole: bool,
    loops: bool = False,
) -> Graph | None:
    """The graph of a call that our operators compute; None: PyG's code is to, and a log says why.

    Args:
        layer: of a class of ours, or of a user's below one.
        x, edge_index, edge_attr: as given to its forward.
        whole: the weights of edges are asked for, or thinned by dropout, each on its own.
        loops: with one loop at each node in place of those among the edges.
    """
    reason = unusual() or own_ways(layer) or _other_input(layer, x, edge_index, edge_attr, whole)
    if reason is None:
        try:
            return cached_graph(edge_index, len(x), layer.flow, one_loop_each=loops)
        except (TypeError, ValueError, NotImplementedError):
            reason = "its edges are none of a graph on the nodes of x"  # as PyG's code will say
    if not torch.compiler.is_compiling():  # it would break the compiled program in two
        _say_once(type(layer).__name__, reason)
    return None


def is_whole(layer: Any, wanted: bool) -> bool:
    """Whether a call needs the weights of its edges: to return them, or to drop some."""
    return wanted or bool(layer.dropout and layer.training)


def attended(
    layer: Any, values: Tensor, q: Tensor, k: Tensor, *, graph: Graph, score: str | AbstractScore,
    whole: bool, edge_key: Tensor | None = None, edge_value: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The weighted sums, `[N, H·C]` or of their mean `[N, C]`; and of edges, if `whole`, the
    weights `[E, H]` without and with dropout, in slot order.

    The same elements are dropped as by PyG's code from the same state of the random numbers.
    """
    if not whole:
        y = attention_product(
            values, q, k, graph, score=score, reduce="cat" if layer.concat else "mean",
            edge_key=edge_key, edge_value=edge_value,
        )  # fmt: skip
        return y, None, None
    a = edge_attention(q, k, graph, score=score, edge_order="csr")
    kept = a
    if layer.training and layer.dropout:
        scales = functional.dropout(torch.ones_like(a), layer.dropout)
        kept = a * to_slots(scales, graph)
    y = spmm(graph, kept, values, edge_order="csr")
    y = y.flatten(1) if layer.concat else y.mean(1)
    return y, a, kept


def own_ways(layer: MessagePassing) -> str | None:
    """Why a layer passes messages in another way than PyG's class does; None as a rule."""
    if not is_silent(layer.aggr_module, SumAggregation.forward):
        return "messages are not added up"
    if layer.explain or layer.decomposed_layers != 1 or layer.node_dim != 0:
        return "it is explained or decomposed"
    if any(getattr(layer, name) for name in _HOOKS):
        return "its messages have hooks"
    if _is_rewritten(type(layer)) or _has_own_part(layer):
        return "a part of its message passing is of its own"
    if not 0 <= layer.dropout <= 1:
        return "dropout is no probability"
    return None


def _is_rewritten(cls: type) -> bool:
    """Whether a class has a part that is neither PyG's, nor what PyG has generated for it."""
    for each in cls.__mro__:
        makers = "torch_geometric.", f"{each.__module__}_{each.__name__}_"
        parts = (vars(each)[name] for name in _PARTS if name in vars(each))
        if not all(getattr(part, "__module__", "").startswith(makers) for part in parts):
            return True
    return False


def _has_own_part(layer: MessagePassing) -> bool:
    """Whether a layer has a part that its class has not; PyG itself gives one that was explained
    its `propagate` back this way."""
    classes = (vars(each) for each in type(layer).__mro__)
    generated = [names["_jinja_propagate"] for names in classes if "_jinja_propagate" in names]
    own = [vars(layer)[name] for name in _PARTS if name in vars(layer)]
    return any(getattr(part, "__func__", part) not in generated for part in own)


def _other_input(layer: Any, x: Any, edge_index: Any, edge_attr: Any, whole: bool) -> str | None:
    if not isinstance(x, Tensor) or x.dim() != 2:
        return "x is not one table of nodes"
    if type(edge_index) is not Tensor or edge_index.device != x.device:
        return f"edges come as {type(edge_index).__name__}, or on another device"
    has_table = edge_attr is not None or layer.lin_edge is not None
    if edge_index.layout is torch.sparse_csr:
        if has_table or whole or layer.flow != "source_to_target":
            return "a matrix of edges comes with features, or its weights are asked for"
        return None if edge_index.shape == (len(x), len(x)) else "its matrix has another size"
    if edge_index.dtype is not torch.int64 or edge_index.dim() != 2:
        return "edges are not int64 [2, E]"
    if edge_attr is not None and not (
        isinstance(edge_attr, Tensor) and edge_attr.shape[:1] == edge_index.shape[1:]
    ):
        return "edge_attr has not one row for each edge"
    if has_table and whole and layer.lin_edge is not None:
        return "weights of edges with features are asked for, or thinned by dropout"
    return None


@lru_cache(maxsize=64)
def _say_once(name: str, reason: str) -> None:
    _log.warning("%s: runs by PyG's own code: %s.", name, reason)
