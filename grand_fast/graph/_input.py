"""What a user gives as a graph → receivers, senders and weights, checked."""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Flow = Literal["source_to_target", "target_to_source"]
FLOWS = ("source_to_target", "target_to_source")
_INT32_MAX = 2**31 - 1
_INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def index_dtype(n: int, e: int) -> torch.dtype:
    """Of the arrays of a graph with `n` nodes and `e` edges."""
    return torch.int32 if max(n, e) <= _INT32_MAX else torch.int64


def message(argument: str, expected: str, got: str, remedy: str = "") -> str:
    """The one form of error."""
    return f"Graph: `{argument}` {expected}, got {got}.{' ' + remedy if remedy else ''}"


def edges_of(edge_index: Any, flow: str) -> tuple[Tensor, Tensor, int | None, Tensor | None]:
    """Receivers, senders (int64), the size if the input knows it, and its weights."""
    if hasattr(edge_index, "tocoo") and hasattr(edge_index, "shape"):  # scipy.sparse
        coo = edge_index.tocoo()
        rows, cols = (torch.from_numpy(np.asarray(i, dtype=np.int64)) for i in (coo.row, coo.col))
        return rows, cols, _square(coo.shape), _floating(torch.from_numpy(np.array(coo.data)))
    if hasattr(edge_index, "sparse_sizes") and hasattr(edge_index, "coo"):  # SparseTensor
        rows, cols, values = edge_index.coo()
        return rows, cols, _square(edge_index.sparse_sizes()), _floating(values)
    if not isinstance(edge_index, Tensor):
        kinds = "an integer tensor [2, E], EdgeIndex, or a sparse matrix"
        raise TypeError(message("edge_index", f"must be {kinds}", type(edge_index).__name__))
    if edge_index.layout is not torch.strided:
        matrix = edge_index.detach().to_sparse_coo()  # type: ignore[no-untyped-call]
        # coalesce() would add up repeated edges; a CSR tensor's own order is already by row
        rows, cols = matrix._indices()
        n = _square(tuple(matrix.shape))
        if edge_index.requires_grad:
            _check_entries(edge_index, rows, cols, n)
        return rows, cols, n, weight_of(edge_index)
    size = None
    pyg = sys.modules.get("torch_geometric")  # whoever holds an EdgeIndex has imported it
    if pyg is not None and isinstance(edge_index, pyg.EdgeIndex):
        size = max((s for s in edge_index.sparse_size() if s is not None), default=None)
        edge_index = edge_index.as_tensor()
    if edge_index.dtype not in _INDEX_DTYPES:
        remedy = "Convert it with .long()." if edge_index.is_floating_point() else ""
        raise TypeError(
            message("edge_index", "must be of an integer dtype", str(edge_index.dtype), remedy)
        )
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        shape = list(edge_index.shape)
        transposed = edge_index.dim() == 2 and shape[1] == 2
        remedy = "Did you mean edge_index.t()?" if transposed else ""
        raise ValueError(message("edge_index", "must have shape [2, E]", str(shape), remedy))
    first, second = edge_index.long()
    return (second, first, size, None) if flow == FLOWS[0] else (first, second, size, None)


def weight_of(matrix: Tensor) -> Tensor | None:
    """The stored values of a sparse matrix, in their own order, differentiable where it is."""
    if matrix.layout is not torch.sparse_coo:
        return _floating(matrix.values())
    return _floating(_Values.apply(matrix))  # type: ignore[no-untyped-call]


class _Values(torch.autograd.Function):
    """`values()` of a COO matrix; torch's own must be coalesced, which a transposed one is not."""

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return matrix._values()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        (matrix,) = inputs
        ctx.save_for_backward(matrix._indices())
        ctx.shape = matrix.shape

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor) -> Tensor:
        (indices,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(indices, dvalues, ctx.shape)


def _check_entries(matrix: Tensor, rows: Tensor, cols: Tensor, n: int) -> None:
    """Entries whose gradients torch keeps apart.

    It adds up those of repeated entries, which are edges of their own here, and confuses those of a
    compressed matrix that are not in rising order.
    """
    keys = cols * n + rows if matrix.layout is torch.sparse_csc else rows * n + cols
    if matrix.layout is torch.sparse_coo:
        keys = keys.sort().values
    if bool((keys.diff() <= 0).any()):
        raise NotImplementedError(
            message(
                "edge_index",
                "as a matrix that requires a gradient must have distinct entries, in rising order "
                "where it is compressed",
                "others",
                "Pass an edge index and `edge_weight`; or matrix.coalesce(), which adds them up.",
            )
        )


def _square(shape: Any) -> int:
    rows, cols = (int(s) for s in shape)
    if rows != cols:
        raise ValueError(message("edge_index", "as a matrix must be square", f"[{rows}, {cols}]"))
    return rows


def _floating(values: Tensor | None) -> Tensor | None:
    if values is None or values.is_floating_point():
        return values
    return values.to(torch.get_default_dtype())


def num_nodes_of(given: int | None, size: int | None, receiver: Tensor, sender: Tensor) -> int:
    """`N`: given, that of a matrix, or the largest id plus one."""
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | np.integer):
            raise TypeError(message("num_nodes", "must be an int or None", type(given).__name__))
        if given < 0 or given > _INT32_MAX:
            raise ValueError(message("num_nodes", "must lie in [0, 2³¹)", str(given)))
        return int(given)
    if size is not None:
        return size
    if receiver.numel() == 0:
        return 0
    return max(int(torch.maximum(receiver.max(), sender.max())) + 1, 0)


def check_ids(receiver: Tensor, sender: Tensor, n: int) -> None:
    """Ids lie in `[0, n)`."""
    if receiver.numel() == 0:
        return
    low = int(torch.minimum(receiver.min(), sender.min()))
    high = int(torch.maximum(receiver.max(), sender.max()))
    if low < 0:
        raise ValueError(message("edge_index", "must hold ids of at least 0", f"id {low}"))
    if high >= n:
        remedy = f"Pass num_nodes={high + 1} or drop these edges."
        raise ValueError(
            message("edge_index", f"must hold ids below num_nodes={n}", f"id {high}", remedy)
        )


def check_weight(weight: Tensor | None, receiver: Tensor, validate: bool) -> None:
    """Floating, one for each edge, on its device; finite too if `validate`."""
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(message("edge_weight", "must be a floating tensor", got))
    e = receiver.numel()
    if tuple(weight.shape) != (e,):
        shape = list(weight.shape)
        remedy = "Did you mean edge_weight.flatten()?" if weight.numel() == e else ""
        raise ValueError(message("edge_weight", f"must have shape [E] = [{e}]", str(shape), remedy))
    if weight.device != receiver.device:
        raise ValueError(
            message(
                "edge_weight",
                f"must be on the device of edge_index, {receiver.device}",
                str(weight.device),
                f"Move it with .to('{receiver.device}').",
            )
        )
    if validate and not bool(torch.isfinite(weight.detach()).all()):
        bad = int((~torch.isfinite(weight.detach())).nonzero()[0])
        raise ValueError(message("edge_weight", "must be finite", f"{weight[bad]} at edge {bad}"))


def append_loops(
    receiver: Tensor, sender: Tensor, weight: Tensor | None, n: int, loop_weight: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Receivers, senders and weights with a loop more for each node that has none."""
    if isinstance(loop_weight, bool) or not isinstance(loop_weight, int | float):
        got = repr(loop_weight)
        raise TypeError(message("self_loops", "must be a float or None", got, "Try 1.0."))
    if not math.isfinite(loop_weight):
        raise ValueError(message("self_loops", "must be finite", str(loop_weight)))
    bare = torch.ones(n, dtype=torch.bool, device=receiver.device)
    bare[receiver[receiver == sender]] = False
    loops = bare.nonzero().flatten()
    if weight is None and loop_weight != 1.0:
        weight = torch.ones(receiver.numel(), device=receiver.device)
    if weight is not None:
        weight = torch.cat([weight, weight.new_full((loops.numel(),), loop_weight)])
    return torch.cat([receiver, loops]), torch.cat([sender, loops]), weight
