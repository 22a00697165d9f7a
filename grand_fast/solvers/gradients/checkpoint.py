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


ADJOINTS: dict[str, Differentiate] = {
    "direct": _direct,
    "checkpoint": run_again,
}


def autocast_of(x: Tensor) -> torch.autocast:
    """The region of autocast that tensors like `x` are in, for what runs later as it would now."""
    device = x.device.type
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


class _Saved:
    """What autograd saves of a step: kept while the step runs, later had by running it again."""

    def __init__(self, step: Take, x: Tensor, carry: Carry) -> None:
        self.step, self.state = step, tuple(_detached(t) for t in (x, *carry))
        self.kept: list[Tensor] | None = []
        self.count = 0
        self.random = torch.get_rng_state(), *get_device_states(x)
        self.autocast = autocast_of(x)

    def pack(self, t: Tensor) -> int:
        """Its number among the saved."""
        assert self.kept is not None
        self.kept.append(t.detach())
        return len(self.kept) - 1

    def drop(self) -> None:
        """The step has run."""
        assert self.kept is not None
        self.count, self.kept = len(self.kept), None

    def unpack(self, i: int) -> Tensor:
        """The tensor of that number, kept until autograd lets go of the step."""
        if self.kept is None:
            self.kept = self._again()
        return self.kept[i]

    def _again(self) -> list[Tensor]:
        found: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            found.append(t.detach())
            return t.detach()

        cpu, devices, states = self.random
        x, *carry = self.state
        with (
            outside_transforms(), torch.random.fork_rng(devices), torch.enable_grad(),
            self.autocast,
        ):  # fmt: skip
            torch.set_rng_state(cpu)
            set_device_states(devices, states)
            with saved_tensors_hooks(pack, lambda t: t):
                self.step(x, tuple(carry))
        if len(found) != self.count:
            raise RuntimeError(
                "integrate: `term` must do the same whenever it is called with the same state, "
                f"and saved {len(found)} tensors instead of {self.count}."
            )
        return found


def _detached(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


def checkpoint_differentiating(step: Take, x: Tensor, carry: Carry) -> Any:
    """As "checkpoint", for a step that computes gradients within itself.

    For each of which torch's own checkpoint would run the step again, during the forward pass.
    """
    saved = _Saved(step, x, carry)
    with saved_tensors_hooks(saved.pack, saved.unpack):
        taken = step(x, carry)
    saved.drop()
    return taken
