"""How a solve is differentiated."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grand_fast.solvers._solver import Carry

Adjoint = Literal["direct", "checkpoint", "continuous"]
Take = Callable[[Tensor, Carry], Any]  # a step, or tensors and numbers that hold one
Differentiate = Callable[[Take, Tensor, Carry], Any]


def _direct(step: Take, x: Tensor, carry: Carry) -> Any:
    """Autograd keeps what each stage saves."""
    return step(x, carry)


def _checkpoint(step: Take, x: Tensor, carry: Carry) -> Any:
    """Keep the state before the step alone; run the step again in backward."""
    if not torch.is_grad_enabled():
        return step(x, carry)
    return checkpoint(step, x, carry, use_reentrant=False)


ADJOINTS: dict[str, Differentiate] = {
    "direct": _direct,
    "checkpoint": _checkpoint,
}
