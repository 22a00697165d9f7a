"""In the place of `torch_sparse.spmm`: our product, with the attention in one pass if it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grand_fast.compat.active import active, unusual
from grand_fast.compat.deferred import Deferred, write
from grand_fast.compat.graphs import graph_of, product
from grand_fast.compat.options import Report
from grand_fast.compat.weights import Head, Mean

NAME = "torch_sparse.spmm"
FUSED = f"{NAME}, one pass with the attention"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Theirs:
    """The function that ours stands for; that of torch_sparse where there was no patch."""

    spmm: Callable[..., Tensor] | None = None


def spmm(index: Tensor, value: Tensor, m: int, n: int, matrix: Tensor) -> Tensor:
    """`torch_sparse.spmm`: `y_i = Σ_e value_e matrix_j` over the edges with `index[:, e] = (i, j)`.

    Args:
        index: `[2, E]`; row 0 receives.
        value: `[E]`.
        m, n: rows and columns of the sparse matrix.
        matrix: `[n, d]`, or `[n]`, which counts as `[n, 1]`.
    """
    patch = active("spmm")
    if patch is not None:
        y = _ours(index, value, m, n, matrix, patch.report)
        if y is not None:
            return y
    if Theirs.spmm is None:
        import torch_sparse

        Theirs.spmm = torch_sparse.spmm
    return Theirs.spmm(index, value, m, n, matrix)


def _ours(index: Any, value: Any, m: Any, n: Any, matrix: Any, report: Report) -> Tensor | None:
    reason = unusual() or _not_ours(index, value, m, n, matrix)
    if reason is not None:
        report.leave(NAME, reason)
        return None
    try:
        graph = graph_of(index, n)
    except (TypeError, ValueError) as error:  # theirs says it in its own way
        report.leave(NAME, str(error))
        return None
    x = matrix if matrix.dim() == 2 else matrix.unsqueeze(-1)
    if isinstance(value, Deferred):
        recipe = value.recipe
        found = None
        if value.written is None and isinstance(recipe, Mean | Head):
            found = recipe.times(x, graph)
        if found is not None:
            y, is_fused = found
            report.use(FUSED if is_fused else NAME)
            return y
        value = write(value)
    report.use(NAME)
    return product(value, x, graph)


def _not_ours(index: Any, value: Any, m: Any, n: Any, matrix: Any) -> str | None:
    if not all(isinstance(t, Tensor) for t in (index, value, matrix)):
        return "its arguments are no tensors"
    if any(t.layout is not torch.strided or t.is_meta for t in (index, value, matrix)):
        return "its arguments are no ordinary tensors"
    if m != n or matrix.dim() not in (1, 2) or matrix.shape[0] != n:
        return "its matrix is not square"
    if matrix.dim() == 2 and not matrix.shape[1]:
        return "its matrix has no columns"
    if index.dim() != 2 or index.shape[0] != 2 or index.dtype != torch.int64:
        return "its index is not [2, E] of int64"
    if value.shape != index.shape[1:]:
        return "its values are not [E]"
    if value.dtype not in _FLOATS or matrix.dtype not in _FLOATS:
        return "its numbers are not floating"
    if not value.device == matrix.device == index.device:
        return "its tensors are on several devices"
    return None
