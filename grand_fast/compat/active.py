"""Which patches are at work, and for whom."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from grand_fast.compat.options import Options
from grand_fast.ops.backends import unusual as unusual

stack: list[Options] = []  # the one applied last stands last
covered: WeakIdKeyDictionary = WeakIdKeyDictionary()  # modules of a patched model → its patches


class _Thread(threading.local):
    def __init__(self) -> None:
        self.inside: list[Options] = []  # patches of models whose forward is running
        self.paused = 0


_thread = _Thread()


def active(option: str) -> Options | None:
    """The patch that answers a call made now: the last one that covers it, if its option is on."""
    if _thread.paused:
        return None
    for patch in reversed(stack):
        if patch.target is None or patch in _thread.inside:
            return patch if getattr(patch, option) else None
    return None


@contextmanager
def paused() -> Iterator[None]:
    """Everything runs as it was: what a layer of a user's computes on its own is asked for."""
    _thread.paused += 1
    try:
        yield
    finally:
        _thread.paused -= 1


def patches_of(module: nn.Module) -> tuple[Options, ...]:
    """The patches of the models that a module is part of."""
    found: tuple[Options, ...] = covered.get(module, ())  # type: ignore[no-untyped-call]
    return found


def enter(module: nn.Module, args: object) -> None:
    """Forward pre-hook of the modules of a patched model; of a copy of one it does nothing."""
    _thread.inside += patches_of(module)


def leave(module: nn.Module, args: object, output: object) -> None:
    """Forward hook, called after an exception too."""
    for patch in patches_of(module):
        if patch in _thread.inside:
            _thread.inside.remove(patch)
