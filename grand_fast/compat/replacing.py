"""Functions of other packages, and forwards of attention layers, replaced and put back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from grand_fast.compat import attention, fields

# torchdiffeq's own modules go on with its own functions, which ours call; torch has none of them
_LEFT = ("grand_fast.", "torch.", "torchdiffeq._impl")


_found: dict[str, list[type[nn.Module]]] = {}  # option → classes whose forward is ours
_KINDS = {"attention": attention, "fields": fields}


def replace(pairs: Iterable[tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    """Every name of a pair's first in a module that is imported becomes one of its second."""
    by_id = {id(old): new for old, new in pairs}
    for key, module in list(sys.modules.items()) if by_id else ():
        if not isinstance(module, ModuleType) or key.startswith(_LEFT):
            continue
        found = [name for name, value in vars(module).copy().items() if id(value) in by_id]
        for name in found:
            setattr(module, name, by_id[id(vars(module)[name])])


def hook_classes(option: str) -> None:
    """All there are of the kind that the option is about, and each as soon as it is defined."""
    if not _found:
        nn.Module.__init_subclass__ = classmethod(_see)  # type: ignore[assignment, arg-type]
    _found[option] = []
    for cls in set(_subclasses(nn.Module)):
        _hook(cls, option)


def unhook_classes(option: str) -> None:
    """As it was."""
    for cls in _found.pop(option):
        theirs = getattr(vars(cls)["forward"], "_theirs", None)
        if theirs is not None:  # not one that somebody has put there since
            cls.forward = theirs
    if not _found:
        del nn.Module.__init_subclass__


def _see(cls: type[nn.Module], **further: Any) -> None:
    super(nn.Module, cls).__init_subclass__(**further)
    for option in _found:
        _hook(cls, option)


def _hook(cls: type[nn.Module], option: str) -> None:
    kind = _KINDS[option]
    if not cls.__module__.startswith(("torch.", "grand_fast.")) and kind.is_one(cls):
        cls.forward = kind.hooked(vars(cls)["forward"])
        _found[option].append(cls)


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
