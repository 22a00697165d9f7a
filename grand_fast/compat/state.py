"""What an attention layer holds at one moment, and its forward may depend on beside its inputs."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import operator
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grand_fast.compat import active

_PLAIN = frozenset({
    int, float, complex, str, bytes, bool, type(None), type(Ellipsis), range, type,
    torch.dtype, torch.device, torch.layout, torch.Size, types.BuiltinFunctionType,
})  # fmt: skip
_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_OWN = frozenset(vars(nn.Module()))  # of every module; those of them that count are asked for
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEEPEST, _LONGEST = 8, 4096


class State:
    """Modules, tensors and plain values that a layer holds, to be compared with another time's.

    Args:
        layer: hooks of its own are no part of its forward; those of its children would be.

    Raises:
        TypeError: it holds something of which nobody can say whether it has changed.
    """

    __slots__ = ("_depth", "objects", "tensors", "values", "versions")

    def __init__(self, layer: nn.Module) -> None:
        self.objects: list[Any] = []  # which are the same, or not
        self.values: list[Any] = []  # which are equal, or not
        self.versions: list[Any] = []  # of parameters
        self.tensors: list[Tensor] = []  # that are no parameters
        self._depth = 0
        for name, module in layer.named_modules():
            held = vars(module)
            if module is not layer:
                self.objects.append(module)
                if any(_are_hooks(held.get(name)) for name in _HOOKS):
                    raise TypeError(f"its {name} has hooks")
            self.values += (name, type(module), module.training)
            for key, p in module._parameters.items():
                self.values.append(key)
                self.objects.append(p)
                self.versions.append(None if p is None else _version(p))
            for key, buffer in module._buffers.items():
                self.values.append(key)
                self._add(buffer)
            self._add_items({k: v for k, v in held.items() if k not in _OWN})

    def is_like(self, other: State, *, parameters: bool) -> bool:
        """Whether nothing has changed between the two; nor in the `parameters`, if they count."""
        return (
            self.values == other.values
            and (not parameters or self.versions == other.versions)
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )

    def _add(self, value: Any) -> None:
        kind = type(value)
        self.values.append(kind)
        if kind in _PLAIN or isinstance(value, np.generic):
            self.values.append(value)
        elif isinstance(value, Tensor):
            self.tensors.append(value)
            self.objects.append(value)
            self.values.append(_version(value))
        elif isinstance(value, enum.Enum | type) or _is_bare_function(value):
            self.objects.append(value)
        else:
            self._add_parts(value)

    def _add_parts(self, value: Any) -> None:
        if isinstance(value, dict):
            self._add_items(value)
        elif hasattr(value, "keys") and hasattr(value, "__getitem__"):  # as loggers give options
            self._add_items(dict(value))
            return
        elif isinstance(value, list | tuple):
            self._add_all(value)
        elif isinstance(value, set | frozenset) and _PLAIN.issuperset(map(type, value)):
            self.values.append(frozenset(value))
        elif not _is_namespace(value):
            raise TypeError(f"it holds a {type(value).__name__}, which may change")
        further = getattr(value, "__dict__", None)
        if further:
            self._add_items(further)

    def _add_items(self, items: dict[Any, Any]) -> None:
        if not _PLAIN.issuperset(map(type, items)):
            raise TypeError("it holds a dict whose keys may change")
        self.values.append(tuple(items))
        self._add_all(tuple(items.values()))

    def _add_all(self, parts: Any) -> None:
        if len(parts) > _LONGEST or self._depth == _DEEPEST:
            raise TypeError("it holds too much to be compared at each call")
        kinds = tuple(map(type, parts))
        self.values.append(kinds)
        if _PLAIN.issuperset(kinds):
            self.values.append(tuple(parts))
            return
        self._depth += 1
        for part in parts:
            self._add(part)
        self._depth -= 1


def _are_hooks(hooks: dict[int, Any] | None) -> bool:
    return any(hook not in (active.enter, active.leave) for hook in (hooks or {}).values())


def _is_namespace(value: Any) -> bool:
    is_one = isinstance(value, _NAMESPACES) or dataclasses.is_dataclass(value)
    return is_one and hasattr(value, "__dict__")  # not slots


def _is_bare_function(value: Any) -> bool:
    return type(value) is types.FunctionType and value.__closure__ is None and not vars(value)


def _version(tensor: Tensor) -> Any:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.shape
