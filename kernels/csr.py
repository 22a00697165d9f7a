"""The graph arrays and the cost record that every launcher shares."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Tensors that a launcher adds to its result in the same pass, each with its scale
Add = Sequence[tuple[float, Tensor]]


class Csr(NamedTuple):
    """One CSR view of the graph, as launchers take it: `A` (rows receive) or `Aᵀ`.

    rowptr: [N+1], col: [E], both int32 or both int64.
    slot:   [E], slot in this view → slot in the CSR of `A`; None in the view of `A` itself.
    work:   what the backend's `plan` put there; None for the reference. A plan may also lay out the
            rows in an order of its own, which only its kernels understand.
    """

    rowptr: Tensor
    col: Tensor
    slot: Tensor | None
    work: Any


# What a backend makes of a plain view. The function finds the order [N] in which rows are best
# visited (None: by number); that takes a while, so only a backend that follows an order calls it.
Plan = Callable[[Csr, Callable[[], Tensor | None]], Csr]


class Cost(NamedTuple):
    """Bytes and flops of one call. bytes_min: each row read once; bytes_max: no row reused."""

    bytes_min: int
    bytes_max: int
    flops: int


def edge_rows(csr: Csr) -> Tensor:
    """Row of each slot, [E]: the inverse of `rowptr`."""
    n = csr.rowptr.numel() - 1
    rows = torch.arange(n, device=csr.rowptr.device)
    return torch.repeat_interleave(rows, csr.rowptr.diff(), output_size=csr.col.numel())


def in_view(table: Tensor, csr: Csr) -> Tensor:
    """`table [E, …]`, in slots of `A` → in those of the view, where a row's edges lie together."""
    return table if csr.slot is None else table.index_select(0, csr.slot)


def in_slots(table: Tensor, csr: Csr) -> Tensor:
    """`in_view` undone."""
    if csr.slot is None:
        return table
    return torch.empty_like(table).index_copy_(0, csr.slot.to(table.device, torch.int64), table)
