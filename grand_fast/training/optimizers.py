"""The optimisers of `torch.optim` by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grand_fast.training.option_types import BadOptionError

# SparseAdam takes sparse gradients only, and ours are dense
_OTHERS = (Optimizer, torch.optim.SparseAdam)
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in sorted(vars(torch.optim).items(), key=lambda item: item[0].lower())
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind not in _OTHERS
}


def make_optimizer(
    name: str, parameters: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0
) -> Optimizer:
    """An optimiser with its own defaults but for these two.

    Args:
        name: of a class in `torch.optim`, in any case.
        parameters: what it changes.
        lr, weight_decay: as that class understands them.

    Raises:
        BadOptionError: unknown name, a weight decay where there is none to set, or parameters that
            it does not take.
    """
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        raise BadOptionError(
            f"fit: `optimizer` must be one of {', '.join(OPTIMIZERS)}, got {name!r}."
        )
    options: dict[str, Any] = {"lr": lr}
    if "weight_decay" in inspect.signature(kind).parameters:
        options["weight_decay"] = weight_decay
    elif weight_decay:
        raise BadOptionError(
            f"fit: `weight_decay` must be 0 with {kind.__name__}, which has none, got "
            f"{weight_decay:g}."
        )
    try:
        return kind(parameters, **options)
    except ValueError as error:
        raise BadOptionError(
            f"fit: `optimizer` must take this model and these options, got {kind.__name__}: {error}"
        ) from error
