"""What a user gives as a graph → receivers, senders and weights."""

import math
import sys
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Flow = Literal["source_to_target", "target_to_source"]
FLOWS = ("source_to_target", "target_to_source")
INT32_MAX = 2**31 - 1
_LARGEST_ITEM = 8  # bytes of a number that torch knows
_BLOCKS = (torch.sparse_bsr, torch.sparse_bsc)
_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, *_BLOCKS)
_INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def index_dtype(n: int, e: int) -> torch.dtype:
    """Of the arrays of a graph with `n` nodes and `e` edges."""
    return torch.int32 if max(n, e) <= INT32_MAX else torch.int64


def message(argument: str, expected: str, got: str, remedy: str = "") -> str:
    """The one form of error."""
    return f"Graph: `{argument}` {expected}, got {got}.{' ' + remedy if remedy else ''}"


def edges_of(
    edge_index: Any, flow: str, num_nodes: int | None = None
) -> tuple[Tensor, Tensor, int | None, Tensor | None]:
    """Receivers, senders (int64), the size if the input knows it, and its weights."""
    if hasattr(edge_index, "tocoo") and hasattr(edge_index, "shape"):  # scipy.sparse
        return _scipy_edges(edge_index)
    if hasattr(edge_index, "sparse_sizes") and hasattr(edge_index, "coo"):  # SparseTensor
        rows, cols, values = edge_index.coo()
        return rows, cols, _square(edge_index.sparse_sizes()), _floating(values)
    if not isinstance(edge_index, Tensor):
        kinds = "an integer tensor [2, E], EdgeIndex, or a sparse matrix"
        raise TypeError(message("edge_index", f"must be {kinds}", type(edge_index).__name__))
    if edge_index.layout is not torch.strided:
        edge_index = _matrix(edge_index)
        matrix = edge_index.detach().to_sparse_coo()
        # coalesce() would add up repeated edges; a CSR tensor's own order is already by row
        rows, cols = matrix._indices()
        n = _square(tuple(matrix.shape))
        if edge_index.requires_grad:
            _check_entries(edge_index, rows, cols, n)
        return rows, cols, n, weight_of(edge_index)
    size = None
    pyg = sys.modules.get("torch_geometric")  # whoever holds an EdgeIndex has imported it
    if pyg is not None and isinstance(edge_index, pyg.EdgeIndex):
        size = _edge_index_size(edge_index, num_nodes)
        edge_index = edge_index.as_tensor()
    if edge_index.dtype not in _INDEX_DTYPES:
        remedy = "Convert it with .long()." if edge_index.is_floating_point() else ""
        got = str(edge_index.dtype)
        raise TypeError(message("edge_index", "must be of an integer dtype", got, remedy))
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        shape = list(edge_index.shape)
        transposed = edge_index.dim() == 2 and shape[1] == 2
        remedy = "Did you mean edge_index.t()?" if transposed else ""
        if edge_index.dim() > 2:
            remedy = "Join the graphs of a batch into one, whose node ids follow one another."
        raise ValueError(message("edge_index", "must have shape [2, E]", str(shape), remedy))
    if edge_index.is_meta:
        raise ValueError(message("edge_index", "must hold values", "a tensor on meta"))
    first, second = edge_index.long()
    return (second, first, size, None) if flow == FLOWS[0] else (first, second, size, None)


def _scipy_edges(matrix: Any) -> tuple[Tensor, Tensor, int, Tensor | None]:
    size = _square(matrix.shape)
    coo = matrix.tocoo()
    if getattr(matrix, "format", None) == "bsr":
        coo = _without_fill(coo)
    rows, cols = (torch.from_numpy(np.asarray(i, dtype=np.int64)) for i in (coo.row, coo.col))
    values = np.array(coo.data)
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > _LARGEST_ITEM:
        raise TypeError(_not_real(str(values.dtype)))
    return rows, cols, size, _floating(torch.from_numpy(values))


def _without_fill(coo: Any) -> Any:
    """Of what was stored in blocks, the entries that are not 0: nobody knows which of the zeros
    were given, and which fill up a block."""
    is_edge = coo.data != 0
    return type(coo)((coo.data[is_edge], (coo.row[is_edge], coo.col[is_edge])), shape=coo.shape)


def _matrix(matrix: Tensor) -> Tensor:
    """A sparse matrix, square; one in blocks as COO without their zeros, as `_without_fill`."""
    if matrix.layout not in _LAYOUTS:
        raise TypeError(message("edge_index", "must be dense or sparse", str(matrix.layout)))
    _square(tuple(matrix.shape))
    if matrix.dense_dim():
        remedy = "Convert it with .to_dense().to_sparse()."
        expected, got = "as a matrix must be sparse in rows and columns", "a dense dimension"
        raise ValueError(message("edge_index", expected, got, remedy))
    if matrix.layout not in _BLOCKS:
        return matrix
    if matrix.requires_grad:
        remedy = "Convert it with .to_dense().to_sparse_csr()."
        expected = "in blocks must not require a gradient"
        raise NotImplementedError(message("edge_index", expected, "requires_grad=True", remedy))
    coo = matrix.to_sparse_coo()  # type: ignore[no-untyped-call]
    is_edge = coo._values() != 0
    return torch.sparse_coo_tensor(
        coo._indices()[:, is_edge], coo._values()[is_edge], coo.shape, check_invariants=False
    )


def _edge_index_size(edge_index: Any, num_nodes: int | None) -> int | None:
    """Of a PyG `EdgeIndex`, where it knows one."""
    rows, cols = sizes = tuple(edge_index.sparse_size())
    if rows == cols or rows is None or cols is None:
        return max((s for s in sizes if s is not None), default=None)
    # Asked for its size, it counts the ids of each row, and cannot be told from one that was given
    counted = tuple(int(ids.max()) + 1 if ids.numel() else 0 for ids in edge_index.as_tensor())
    if num_nodes is None or sizes != counted:
        _square(sizes)
    return None


def stored(edges: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The ids that a tensor of edges holds, in its own form, and its values, differentiable."""
    if edges.layout is torch.strided:
        return (edges.as_tensor() if hasattr(edges, "as_tensor") else edges,), None  # EdgeIndex
    matrix = _matrix(edges)
    if matrix.layout is torch.sparse_coo:
        ids: tuple[Tensor, ...] = (matrix._indices(),)
    elif matrix.layout is torch.sparse_csr:
        ids = matrix.crow_indices(), matrix.col_indices()
    else:
        ids = matrix.ccol_indices(), matrix.row_indices()
    return ids, weight_of(matrix)


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
    if len(shape) != 2 or shape[0] != shape[1]:
        remedy = "Number both sides as one set of nodes; bipartite graphs are not supported."
        remedy, got = remedy * (len(shape) == 2), str([int(s) for s in shape])
        raise ValueError(message("edge_index", "as a matrix must be square", got, remedy))
    return int(shape[0])


def _floating(values: Tensor | None) -> Tensor | None:
    if values is None or values.is_floating_point():
        return values
    if values.is_complex():
        raise TypeError(_not_real(str(values.dtype)))
    return values.to(torch.get_default_dtype())


def _not_real(got: str) -> str:
    return message("edge_index", "as a matrix must hold real numbers", got)


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
