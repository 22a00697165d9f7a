"""What was planned for the arrays of a graph, kept while these very tensors live."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Known(NamedTuple):
    further: tuple[weakref.ref[Tensor], ...]
    views: dict[Any, Any]


def views_of(arrays: Sequence[Tensor]) -> dict[Any, Any]:
    """Where the views of these very tensors are kept while they live.

    A compiled program knows a graph by its arrays alone, and finds here what was planned for them.
    """
    rowptr, *further = arrays
    known: _Known | None = _known.get(rowptr)  # type: ignore[no-untyped-call]
    if known is None or any(ref() is not t for ref, t in zip(known.further, further, strict=True)):
        known = _known[rowptr] = _Known(tuple(weakref.ref(t) for t in further), {})
    return known.views


def alias(t: Tensor) -> Tensor:
    """The same memory as another tensor: a view that held `rowptr` would keep its own key alive."""
    return t.detach()


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
