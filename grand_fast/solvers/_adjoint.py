"""How a solve is differentiated."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grand_fast.solvers._solver import Carry, Step

Adjoint = Literal["direct", "checkpoint", "continuous"]
Take = Callable[[Tensor, Carry], Step]
Differentiate = Callable[[Take, Tensor, Carry], Step]


def _direct(step: Take, x: Tensor, carry: Carry) -> Step:
    """Autograd keeps what each stage saves."""
    return step(x, carry)


def _checkpoint(step: Take, x: Tensor, carry: Carry) -> Step:
    """Keep the state before the step alone; run the step again in backward."""
    if not torch.is_grad_enabled():
        return step(x, carry)
    taken: Step = checkpoint(step, x, carry, use_reentrant=False)
    return taken


ADJOINTS: dict[str, Differentiate] = {
    "direct": _direct,
    "checkpoint": _checkpoint,
}
