"""Linear layers: which may be read instead of called, and their weights side by side."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_TENSORS = (nn.Parameter, Tensor)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `layer` is `x Wᵀ + b` of what its attributes hold, and does nothing else.

    Pruning, weight norms and other parametrisations, hooks, adapters, quantised and lazy layers all
    show in one of these attributes; they must be called.
    """
    if type(layer) is not nn.Linear or not is_silent(layer, nn.Linear.forward):
        return False
    # A subclass of Tensor may do anything in a product; a compiler's own is one
    return torch.compiler.is_compiling() or type(layer.weight) in _TENSORS


def is_silent(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether calling `module` is `forward` and nothing else: no hook is told of it."""
    if type(module).forward is not forward or "forward" in vars(module):
        return False
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return not any(hooks) and not _has_any_global_hook()  # type: ignore[no-untyped-call]


def joined(first: nn.Linear, second: nn.Linear, *, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Weight and bias of two plain layers, one below the other.

    Raises:
        ValueError: they are not of one shape.
    """
    if first.weight.shape != second.weight.shape:
        own, other = (f"nn.Linear({m.in_features}, {m.out_features})" for m in (second, first))
        raise ValueError(
            f"AttentionDiffusion: `{names[1]}` must be {other}, like `{names[0]}`, got {own}."
        )
    return torch.cat([first.weight, second.weight]), torch.cat([_bias(first), _bias(second)])


def _bias(layer: nn.Linear) -> Tensor:
    bias: Tensor | None = layer.bias
    return layer.weight.new_zeros(layer.weight.shape[0]) if bias is None else bias


def reset(module: nn.Module) -> None:
    """Start again from random weights, also within modules that do not know how."""
    start_again: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if start_again is not None:
        start_again()
        return
    for child in module.children():
        reset(child)
