"""How a solve is differentiated."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grand_fast.ops._lean import lean
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
    taken: Step = run_again(step, x, carry)
    return taken


def run_again(function: Callable[..., Any], *given: Any) -> Any:
    """`function(*given)`, of which `given` alone is kept: it runs again in backward.

    There it keeps no more than it must: a step's backward is what such a solve takes at its peak.
    """
    if torch.compiler.is_compiling():  # which keeps little anyway
        return checkpoint(function, *given, use_reentrant=False)
    return checkpoint(_leanly, function, *given, use_reentrant=False)


def _leanly(function: Callable[..., Any], *given: Any) -> Any:
    with lean():
        return function(*given)


ADJOINTS: dict[str, Differentiate] = {
    "direct": _direct,
    "checkpoint": _checkpoint,
}
