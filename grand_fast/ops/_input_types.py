"""Inputs of several types: in `torch.autocast`, and values of edges in a type of their own."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from grand_fast.ops.checks import FLOAT_DTYPES

P = ParamSpec("P")
# Kept as they are: operators take them in float32 or wider.
_WIDE = ("alpha", "beta")
_NARROW = (torch.float16, torch.bfloat16, torch.float32)


def autocast_inputs(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """In a region of autocast, run `function` on inputs of one type, and autocast off.

    That type is autocast's own on a GPU, and float32 on a CPU, whose kernels know no half types.
    As everywhere in autocast, float64 stays.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first: Any = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, list | tuple) and first:
            first = first[0]
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        if device == "meta":  # autocast knows no such device; the operator refuses it
            return function(*args, **kwargs)
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        cast = Cast(torch.float32 if device == "cpu" else torch.get_autocast_dtype(device))
        given = {name: v if name in _WIDE else cast(v) for name, v in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return function(*map(cast, args), **given)  # type: ignore[arg-type]

    return call


def widest_terms(terms: Any) -> Any:
    """In a region of autocast, the pairs `(c, y)` with each `y` in the widest of their types."""
    first = terms[0][1] if _are_pairs(terms) else None
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return terms
    types = [y.dtype for _, y in terms] + [torch.float32] * (first.device.type == "cpu")
    dtype = functools.reduce(torch.promote_types, types)
    return [(c, y.to(dtype)) for c, y in terms]


def _are_pairs(terms: Any) -> bool:
    return (
        isinstance(terms, list | tuple)
        and len(terms) > 0
        and all(isinstance(t, tuple) and len(t) == 2 and isinstance(t[1], Tensor) for t in terms)
    )


class Cast:
    """From some types to one; a tensor that is given twice remains one tensor."""

    def __init__(self, dtype: torch.dtype, types: Sequence[torch.dtype] = _NARROW) -> None:
        self._dtype, self._types = dtype, types
        self._known: dict[int, Tensor] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self(v) for v in value]
        if not isinstance(value, Tensor) or value.dtype not in self._types:
            return value
        if id(value) not in self._known:
            self._known[id(value)] = value.to(self._dtype)
        return self._known[id(value)]


def promoted_edges(name: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Run an operator with argument `name`, values of edges, and the tensors of its nodes, which
    have the type of its first argument, in the type that torch gives their product.

    Weights of a graph often come in a type of their own, as sparse libraries have it. Tensors of
    nodes that differ among themselves stay so, and are refused.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        names = list(inspect.signature(function).parameters)
        first, position = names[0], names.index(name)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            edges: Any = args[position] if len(args) > position else kwargs.get(name)
            nodes: Any = args[0] if args else kwargs.get(first)
            if not isinstance(edges, Tensor) or not isinstance(nodes, Tensor):
                return function(*args, **kwargs)
            types = (nodes.dtype, edges.dtype)
            if types[0] == types[1] or not all(t in FLOAT_DTYPES for t in types):
                return function(*args, **kwargs)
            cast = Cast(torch.promote_types(*types), types)
            given = {key: cast(v) for key, v in kwargs.items()}
            return function(*map(cast, args), **given)

        return call

    return decorate
