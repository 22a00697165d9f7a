"""What a vector field is made of: linear layers, read or called, and the scales of its terms."""

from collections.abc import Callable
from typing import Literal, TypeGuard

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
    if module._compiled_call_impl is not None:  # of module.compile()
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


class DiffusionScale(nn.Module):
    """`alpha` and `beta` of `f = alpha (A x − x) + beta x0`.

    Args:
        alpha: `"learned"` is the sigmoid of a parameter that starts at 0; a float fixes it.
        source: learn a `beta` that starts at 0; else there is no source and `beta` is None.
        channels: learn one of each for every channel, `[channels]`; by default scalars.
    """

    def __init__(
        self,
        alpha: float | Literal["learned"] = "learned",
        *,
        source: bool = False,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        learned = alpha == "learned"
        if not learned and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise TypeError(f"diffusion: `alpha` must be a float or 'learned', got {alpha!r}.")
        shape = () if channels is None else (channels,)
        self._fixed_alpha = None if learned else float(alpha)
        self.alpha_logit = nn.Parameter(torch.zeros(shape)) if learned else None
        self.beta = nn.Parameter(torch.zeros(shape)) if source else None

    @property
    def alpha(self) -> Tensor | float:
        """The diffusivity scale: a float if fixed; if learned in (0, 1), scalar or `[channels]`."""
        if self.alpha_logit is not None:
            return torch.sigmoid(self.alpha_logit)
        assert self._fixed_alpha is not None
        return self._fixed_alpha

    def source(self, x0: Tensor | None) -> Tensor | None:
        """`beta x0`, like `x0`; None where there is none."""
        if self.beta is None or x0 is None:
            return None
        return (self.beta * x0).to(x0.dtype)

    def reset_parameters(self) -> None:
        """`alpha = 1/2` if learned, `beta = 0`."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        """The choices, for `print(model)`."""
        alpha = "learned" if self._fixed_alpha is None else self._fixed_alpha
        return f"alpha={alpha}, source={self.beta is not None}"
