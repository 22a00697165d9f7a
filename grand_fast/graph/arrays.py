"""The arrays of a graph: those of a subgraph, and what was planned for them."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph.edge_index import index_dtype, message

# rowptr, col, rowptr_t, col_t, perm, perm_t
Arrays = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def check_mask(mask: Tensor, col: Tensor) -> None:
    """One bool for each edge, on its device."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        remedy = "Compare it with a value, as in a > 0.1." if isinstance(mask, Tensor) else ""
        raise TypeError(message("mask", "must be a boolean tensor", got, remedy))
    if mask.shape != col.shape:
        expected = f"must have shape [E] = [{col.numel()}]"
        raise ValueError(message("mask", expected, str(list(mask.shape))))
    if mask.device != col.device:
        expected, remedy = f"graph's device, {col.device}", f"Move it with .to('{col.device}')."
        raise ValueError(message("mask", f"must be on the {expected}", str(mask.device), remedy))


def kept_arrays(arrays: Arrays, mask: Tensor) -> Arrays:
    """Those of a `Graph`, of the edges in `mask` alone, numbered in the order they had."""
    rowptr, col, rowptr_t, col_t, perm, perm_t = arrays
    is_kept = mask.index_select(0, perm)  # [E], by slot of A
    is_kept_t = is_kept.index_select(0, perm_t)
    edge, slot, slot_t = (_numbers(m, rowptr.dtype) for m in (mask, is_kept, is_kept_t))
    index = index_dtype(rowptr.numel() - 1, int(slot[-1]))
    return (
        slot.index_select(0, rowptr).to(index),
        col[is_kept].to(index),
        slot_t.index_select(0, rowptr_t).to(index),
        col_t[is_kept_t].to(index),
        edge.index_select(0, perm[is_kept]).to(index),
        slot.index_select(0, perm_t[is_kept_t]).to(index),
    )


def _numbers(mask: Tensor, index: torch.dtype) -> Tensor:
    """`[E+1]`: how many are kept before each, which is the new number of one that is."""
    numbers = torch.zeros(mask.numel() + 1, dtype=index, device=mask.device)
    numbers[1:] = mask.cumsum(0, dtype=index)
    return numbers


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
