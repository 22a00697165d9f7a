"""Adjoint "auto": steps keep what their stages save while there is room, then checkpoints."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from grand_fast.ops.backends import free_memory
from grand_fast.ops.calls import recompute
from grand_fast.solvers.gradients.checkpoint import Take, run_again
from grand_fast.solvers.solver import Carry

T = TypeVar("T")

_ALWAYS = 64 << 20  # bytes that a solve may keep, of which no machine is asked whether it has them
_SHARE = 1 / 4  # of what is free beside those
_STATES_OF_A_STEP = 16  # that a step may be expected to keep, before one was measured
# Of one tensor: less is kept, since to compute it again takes longer; more comes in memory fresh
# from the system, whose pages cost as much.
_KEPT_PROJECTION = 16 << 20


class Room:
    """What the steps of one solve from a state like `x` may keep for backward.

    The first step is measured: all that autograd saves of it, each piece of memory once.
    """

    def __init__(self, x: Tensor) -> None:
        self._device = x.device
        size = max(x.numel() * x.element_size(), 1)
        self._limit = _KEPT_PROJECTION / size
        self._step, self._is_measured = _STATES_OF_A_STEP * size, False
        self._left, self._is_asked = float(_ALWAYS), False
        self.lasts = True  # whether all steps so far had room

    @staticmethod
    def of(x: Tensor) -> "Room | None":
        """None where nobody can say what a step keeps: in a program, or where others keep it."""
        if torch.compiler.is_compiling():
            return None
        is_hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return None if is_hooked else Room(x)

    def is_left(self) -> bool:
        """Whether the next step may keep what it saves; once it may not, no other may."""
        if self._left < self._step and not self._is_asked:
            self._left, self._is_asked = self._left + _SHARE * free_memory(self._device), True
        self.lasts = self._left >= self._step
        return self.lasts

    def take(self, step: Callable[..., T], *given: Any) -> T:
        """`step(*given)`, which keeps what it saves."""
        with recompute(self._limit):
            if self._is_measured:
                taken = step(*given)
            else:
                taken = self._measured(step, *given)
        self._left -= self._step
        return taken

    def differentiate(self, step: Take, x: Tensor, carry: Carry) -> Any:
        """Directly while there is room, by a checkpoint after that."""
        return self.take(step, x, carry) if self.is_left() else run_again(step, x, carry)

    def _measured(self, step: Callable[..., T], *given: Any) -> T:
        bytes_of: dict[int, int] = {}

        def pack(t: Tensor) -> tuple[Tensor, int]:
            storage = t.untyped_storage()
            bytes_of[storage.data_ptr()] = storage.nbytes()
            return t, t._version

        with saved_tensors_hooks(pack, _unpacked):
            taken = step(*given)
        self._step, self._is_measured = sum(bytes_of.values()), True
        return taken


def _unpacked(packed: tuple[Tensor, int]) -> Tensor:
    t, version = packed
    if t._version != version:  # which autograd looks for where there are no hooks
        raise RuntimeError(
            "integrate: what a step saved for backward must stay as it was, and has been modified "
            "by an inplace operation. Change parameters after backward()."
        )
    return t
