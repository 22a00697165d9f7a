"""`accelerate`: PyG's attention layers in a model become ours."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from grand_fast.compat.options import Report
from grand_fast.compat.probe import _agree
from grand_fast.ops.backends import backend

# Of the graph of the probe, and columns where a layer takes as many as come
_NODES, _EDGES, _COLUMNS = 11, 47, 3
_log = logging.getLogger("grand_fast")


def accelerate(model: nn.Module, *, verify: bool = True, report: Report | None = None) -> nn.Module:
    """Let PyG's `TransformerConv` and `GATConv` in a model compute on our kernels from now on.

    Their parameters, names and `state_dict` stay; they become `grand_fast.nn.TransformerConv` and
    `GATConv`, which are PyG's by inheritance, so that copies, pickles and moves to another device
    go on as before. Subclasses and other layers are left as they are.

    Args:
        model: changed in place; its layers may be nested, and one may be in several places.
        verify: a layer is replaced only if a copy of it with random weights agrees with one of
            ours in float64, to 1e-9, values and gradients.
        report: what was replaced, and what was left and why, is counted here; without one it is
            logged, of level INFO.

    Returns:
        The model itself.

    Raises:
        TypeError: it is no Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: `model` must be a Module, got {type(model).__name__}.")
    from torch_geometric.nn import MessagePassing

    found = Report() if report is None else report
    ours = _ours()
    for layer in model.modules():
        if not isinstance(layer, MessagePassing) or type(layer) in ours.values():
            continue
        name, reason = type(layer).__name__, _reason(layer, ours, verify)
        if reason is None:
            layer.__class__ = ours[type(layer)]
            found.use(name)
        else:
            found.leave(name, reason)
    if report is None:
        _log.info("accelerate: %s", found)
    return model


def _ours() -> dict[type[nn.Module], type[nn.Module]]:
    """By PyG's class; imported by then, for a model has its layers."""
    import torch_geometric.nn as theirs

    from grand_fast.nn.gat_conv import GATConv
    from grand_fast.nn.transformer_conv import TransformerConv

    return {theirs.GATConv: GATConv, theirs.TransformerConv: TransformerConv}


def _reason(layer: Any, ours: dict[type[nn.Module], type[nn.Module]], verify: bool) -> str | None:
    """Why a layer is left as it is."""
    from grand_fast.nn.message_passing import own_ways

    if type(layer) not in ours:
        return (
            "its class is below PyG's"
            if isinstance(layer, tuple(ours))
            else "there is no such layer here"
        )
    if "forward" in vars(layer):
        return "its forward is of its own"
    if not isinstance(layer.in_channels, int):
        return "it is for two sets of nodes"
    reason = own_ways(layer)
    if reason is not None or not verify:
        return reason
    try:
        with (
            torch.random.fork_rng([]),
            torch.inference_mode(False),
            torch.enable_grad(),
            backend("reference"),
        ):
            return _difference(layer, ours[type(layer)])
    except Exception as error:  # whatever is in a stranger's layer
        return f"its copy failed: {type(error).__name__}: {error}".splitlines()[0]


def _difference(layer: Any, ours: type[nn.Module]) -> str | None:
    """What a copy with random weights and one of ours do not agree in."""
    device = next(layer.parameters()).device
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(device)

    columns = _COLUMNS if layer.in_channels == -1 else layer.in_channels
    x = normal(_NODES, columns).requires_grad_()
    # One node without edges; loops, and edges more than once
    edges = torch.randint(0, _NODES - 1, (2, _EDGES), generator=random).to(device)
    edge_attr = None
    if layer.edge_dim is not None:
        edge_attr = normal(_EDGES, _COLUMNS if layer.edge_dim == -1 else layer.edge_dim)
    theirs = copy.deepcopy(layer).double().eval()
    theirs.forward(x, edges, edge_attr)  # gives parameters that have none yet a shape
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    for p in parameters:
        p.requires_grad_().data.copy_(normal(*p.shape) * p.shape[-1] ** -0.5)
    mine = copy.deepcopy(theirs)
    mine.__class__ = ours
    direction = normal(_NODES, layer.out_channels * (layer.heads if layer.concat else 1))
    found = []
    for each in (theirs, mine):
        y = each.forward(x, edges, edge_attr)
        leaves = [x, *each.parameters()]
        found.append([y, *torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True)])
    for name, a, b in zip(("result", "x", *names), *found, strict=True):
        if (a is None) != (b is None) or (a is not None and not _agree(a, b)):
            return f"its {name} or the gradient by it is not ours: the probe disagrees"
    return None
