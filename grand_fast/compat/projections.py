"""Queries and keys of an attention layer: two matrices, and whether they are no more than that."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def unlike(layer: Any) -> str | None:
    """Why the projections of a layer are not two plain matrices; None if they are."""
    for name in ("Q", "K"):
        module = getattr(layer, name, None)
        if type(module) is not nn.Linear:
            return f"its {name} is no Linear"
        if "forward" in vars(module):
            return f"its {name} has a forward of its own"
        if module._forward_pre_hooks or module._forward_hooks:
            return f"its {name} has hooks"
        if module._backward_pre_hooks or module._backward_hooks:
            return f"its {name} has hooks"
        if module.out_features != getattr(layer, "h", 0) * getattr(layer, "d_k", 0):
            return f"its {name} does not make h · d_k columns"
    return None


def projections(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Its queries and keys of a state, `[N, H, d_k]`: what a probe compares is what a run uses."""
    q, k = (functional.linear(x, m.weight, m.bias) for m in (layer.Q, layer.K))
    return q.view(-1, layer.h, layer.d_k), k.view(-1, layer.h, layer.d_k)
