"""How a solve is differentiated."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from grand_fast.ops.backends import outside_transforms, transforms_active
from grand_fast.ops.calls import recompute
from grand_fast.solvers.solver import Carry

Take = Callable[[Tensor, Carry], Any]  # a step, or tensors and numbers that hold one
Differentiate = Callable[[Take, Tensor, Carry], Any]


def _direct(step: Take, x: Tensor, carry: Carry) -> Any:
    """Autograd keeps what each stage saves.

    Large projections are made again: so many of them come in memory that is fresh from the system,
    whose pages cost as much as the product.
    """
    if torch.compiler.is_compiling():
        return step(x, carry)
    return _recomputing(step, x, carry)


def run_again(function: Callable[..., Any], *given: Any) -> Any:
    """`function(*given)`, of which `given` alone is kept: it runs again in backward.

    There it keeps no more than it must: a step's backward is what such a solve takes at its peak.
    """
    if torch.compiler.is_compiling():  # which keeps little anyway
        return checkpoint(function, *given, use_reentrant=False)
    if transforms_active():  # under which nothing can be had again
        return _recomputing(function, *given)
    return checkpoint(_recomputing_outside, function, *given, use_reentrant=False)


def _recomputing(function: Callable[..., Any], *given: Any) -> Any:
    with recompute():
        return function(*given)


def _recomputing_outside(function: Callable[..., Any], *given: Any) -> Any:
    with recompute(), outside_transforms():
        return function(*given)


ADJOINTS: dict[str, Differentiate] = {"direct": _direct, "checkpoint": run_again}


def autocast_of(x: Tensor) -> torch.autocast:
    """The region of autocast that tensors like `x` are in, for what runs later as it would now."""
    device = x.device.type
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


def checkpoint_differentiating(step: Take, x: Tensor, carry: Carry) -> Any:
    """As "checkpoint", for a step that computes gradients within itself.

    For each of which torch's own checkpoint would run the step again, during the forward pass. What
    autograd saves is kept while the step runs, and had by running it again in backward, once.
    """
    state = tuple(t.detach().requires_grad_(t.requires_grad) for t in (x, *carry))
    cpu, (devices, states), autocast = torch.get_rng_state(), get_device_states(x), autocast_of(x)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> int:
        kept.append(t.detach())
        return len(kept) - 1

    def unpack(i: int) -> Tensor:
        if not kept:
            kept.extend(again())
        return kept[i]

    def again() -> list[Tensor]:
        found: list[Tensor] = []

        def pack_again(t: Tensor) -> Tensor:
            found.append(t.detach())
            return t.detach()

        x, *carry = state
        with (
            outside_transforms(), torch.random.fork_rng(devices), torch.enable_grad(), autocast,
        ):  # fmt: skip
            torch.set_rng_state(cpu)
            set_device_states(devices, states)
            with saved_tensors_hooks(pack_again, lambda t: t):
                step(x, tuple(carry))
        if len(found) != count:
            raise RuntimeError(
                "integrate: `term` must do the same whenever it is called with the same state, "
                f"and saved {len(found)} tensors instead of {count}."
            )
        return found

    with saved_tensors_hooks(pack, unpack):
        taken = step(x, carry)
    count = len(kept)
    kept.clear()
    return taken
