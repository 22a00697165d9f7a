"""Modules by the names of `torch_sparse` and `torch_scatter`, where these cannot be imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from grand_fast.compat import torch_scatter, torch_sparse

MODULES: dict[str, ModuleType] = {"torch_scatter": torch_scatter, "torch_sparse": torch_sparse}


@contextmanager
def stand_ins() -> Iterator[dict[str, str]]:
    """Let `import torch_sparse` and `import torch_scatter` find ours while this block runs.

    Only where theirs cannot be imported; PyG is imported before, for it asks which of them there
    are and would take ours for the whole.

    They are what they say they are: code that uses a part which ours lack fails at that import or
    attribute, by name.

    Returns:
        Why each module that is ours stands in, by its name.
    """
    reasons = {name: why for name in MODULES if (why := _missing(name)) is not None}
    if reasons and importlib.util.find_spec("torch_geometric") is not None:
        _import("torch_geometric.typing")
    for name in reasons:
        sys.modules[name] = MODULES[name]
    try:
        yield reasons
    finally:
        for name in reasons:
            if sys.modules.get(name) is MODULES[name]:
                del sys.modules[name]


def _missing(name: str) -> str | None:
    """Why a module cannot be imported; None if it can."""
    if name in sys.modules:
        return None
    if importlib.util.find_spec(name) is None:
        return "it is not installed"
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
