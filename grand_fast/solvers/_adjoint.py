"""How a solve is differentiated."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Adjoint = Literal["direct", "checkpoint"]
Step = Callable[[Tensor], Tensor]


def _direct(step: Step, x: Tensor) -> Tensor:
    """Autograd keeps what each stage saves."""
    return step(x)


def _checkpoint(step: Step, x: Tensor) -> Tensor:
    """Keep the state before the step alone; run the step again in backward."""
    if not torch.is_grad_enabled():
        return step(x)
    y: Tensor = checkpoint(step, x, use_reentrant=False)
    return y


ADJOINTS: dict[str, Callable[[Step, Tensor], Tensor]] = {
    "direct": _direct,
    "checkpoint": _checkpoint,
}
