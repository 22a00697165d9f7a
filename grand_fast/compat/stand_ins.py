"""Modules by the names of `torch_sparse` and `torch_scatter`, where these cannot be imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from grand_fast.compat import torch_scatter, torch_sparse

MODULES: dict[str, ModuleType] = {"torch_scatter": torch_scatter, "torch_sparse": torch_sparse}
_NOT_THERE = "it is not installed"


@contextmanager
def stand_ins() -> Iterator[dict[str, str]]:
    """Let `import torch_sparse` and `import torch_scatter` find ours while this block runs.

    Only where theirs cannot be imported: ours are found last, after all there is on `sys.path`,
    except where a build is broken. PyG is imported before, for it asks which of them there are and
    would take ours for the whole.

    They are what they say they are: code that uses a part which ours lack fails at that import or
    attribute, by name.

    Returns:
        Why each module that is ours stands in, by its name.
    """
    reasons = {name: why for name in MODULES if (why := _missing(name)) is not None}
    if reasons and importlib.util.find_spec("torch_geometric") is not None:
        _import("torch_geometric.typing")
    broken = _Finder({name: why for name, why in reasons.items() if why != _NOT_THERE})
    last = _Finder(reasons)
    sys.meta_path.insert(0, broken)
    sys.meta_path.append(last)
    try:
        yield reasons
    finally:
        if sys.meta_path is not None:  # as it is when the interpreter ends
            sys.meta_path[:] = [one for one in sys.meta_path if one not in (broken, last)]
        for name in reasons:
            if sys.modules.get(name) is MODULES[name]:
                del sys.modules[name]


class _Finder(MetaPathFinder, Loader):
    """Finds ours for some names, and says why."""

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.reasons:
            return None
        return ModuleSpec(name, self, loader_state=MODULES[name].__spec__)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MODULES[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # its own, which the import has replaced


def _missing(name: str) -> str | None:
    """Why a module cannot be imported; None if it can."""
    if name in sys.modules:
        return None
    spec = importlib.util.find_spec(name)
    if spec is None:
        return _NOT_THERE
    if isinstance(spec.loader, _Finder):  # in another such block
        return spec.loader.reasons[name]
    return _import(name)


def _import(name: str) -> str | None:
    root, before = name.partition(".")[0], set(sys.modules)
    try:
        importlib.import_module(name)
    except Exception as error:  # built for another torch, most often: an OSError
        for part in set(sys.modules) - before:  # whoever imports it next is told the same
            if part.partition(".")[0] == root:
                del sys.modules[part]
        return f"it cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None
