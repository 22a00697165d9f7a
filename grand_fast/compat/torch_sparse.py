"""The parts of `torch_sparse` that graph diffusion code uses, by torch's own operators.

Signatures are those of torch_sparse: a matrix is `index [2, E]`, rows above columns, and `value`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grand_fast.compat.torch_scatter import scatter

__version__ = "0.0+grand_fast"
Entries = tuple[Tensor, Tensor | None]


def spmm(index: Tensor, value: Tensor, m: int, n: int, matrix: Tensor) -> Tensor:
    """The product `[m, d]` of a sparse matrix with `matrix` `[n, d]`."""
    row, col = index[0], index[1]
    x = matrix if matrix.dim() > 1 else matrix.unsqueeze(-1)
    products = x.index_select(-2, col) * value.unsqueeze(-1)
    shape = [*products.shape[:-2], m, products.shape[-1]]
    return products.new_zeros(shape).index_add(-2, row, products)


def coalesce(index: Tensor, value: Tensor | None, m: int, n: int, op: str = "add") -> Entries:
    """Sorted by row, then column, and the values of repeated entries put together by `op`."""
    key, place = torch.unique(index[0] * n + index[1], return_inverse=True)
    index = torch.stack([torch.div(key, n, rounding_mode="floor"), key % n])
    if value is not None:
        value = scatter(value, place, 0, None, len(key), op)
    return index, value


def transpose(
    index: Tensor, value: Tensor | None, m: int, n: int, coalesced: bool = True
) -> Entries:
    """Rows and columns exchanged."""
    index = index.flip(0)
    return coalesce(index, value, n, m) if coalesced else (index, value)


def spspmm(
    indexA: Tensor,
    valueA: Tensor,
    indexB: Tensor,
    valueB: Tensor,
    m: int,
    k: int,
    n: int,
    coalesced: bool = False,
) -> Entries:
    """The product of two sparse matrices, `[m, k]` and `[k, n]`."""
    if coalesced:
        indexA, valueA = coalesce(indexA, valueA, m, k)  # type: ignore[assignment]
        indexB, valueB = coalesce(indexB, valueB, k, n)  # type: ignore[assignment]
    a = torch.sparse_coo_tensor(indexA, valueA, (m, k))
    b = torch.sparse_coo_tensor(indexB, valueB, (k, n))
    product = torch.sparse.mm(a, b).coalesce()
    return product.indices(), product.values()


class SparseTensor:
    """A sparse matrix that can be read, transposed and multiplied by a dense one."""

    def __init__(
        self,
        row: Tensor | None = None,
        rowptr: Tensor | None = None,
        col: Tensor | None = None,
        value: Tensor | None = None,
        sparse_sizes: tuple[int, int] | None = None,
        is_sorted: bool = False,
        trust_data: bool = False,
    ) -> None:
        assert col is not None, "SparseTensor: `col` must be given."
        if row is None:
            assert rowptr is not None, "SparseTensor: `row` or `rowptr` must be given."
            row = torch.arange(len(rowptr) - 1, device=col.device).repeat_interleave(rowptr.diff())
        if sparse_sizes is None:
            m, n = (int(ids.max()) + 1 if ids.numel() else 0 for ids in (row, col))
            sparse_sizes = m if rowptr is None else len(rowptr) - 1, n
        if not is_sorted:
            order = torch.argsort(row * sparse_sizes[1] + col, stable=True)
            row, col = row[order], col[order]
            value = value if value is None else value[order]
        self._row, self._col, self._value, self._sizes = row, col, value, sparse_sizes

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        sparse_sizes: tuple[int, int] | None = None,
        is_sorted: bool = False,
        trust_data: bool = False,
    ) -> SparseTensor:
        """Row 0 of the edges are the rows of the matrix."""
        return cls(edge_index[0], None, edge_index[1], edge_attr, sparse_sizes, is_sorted)

    def coo(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, columns and values."""
        return self._row, self._col, self._value

    def csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where rows begin, columns and values."""
        count = torch.bincount(self._row, minlength=self._sizes[0])
        return torch.cat([count.new_zeros(1), count.cumsum(0)]), self._col, self._value

    def sparse_sizes(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return self._sizes

    def sparse_size(self, dim: int) -> int:
        """One of them."""
        return self._sizes[dim]

    size = sparse_size

    def sizes(self) -> list[int]:
        """As a list."""
        return list(self._sizes)

    def nnz(self) -> int:
        """How many entries it has."""
        return self._col.numel()

    def t(self) -> SparseTensor:
        """Rows and columns exchanged."""
        return SparseTensor(self._col, None, self._row, self._value, self._sizes[::-1])

    def set_value(self, value: Tensor | None, layout: str | None = None) -> SparseTensor:
        """The same entries with other values."""
        return SparseTensor(self._row, None, self._col, value, self._sizes, True)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """All entries; those that are repeated are not added up."""
        value = (
            torch.ones(self.nnz(), device=self._col.device) if self._value is None else self._value
        )
        dense = value.new_zeros((*self._sizes, *value.shape[1:]), dtype=dtype)
        dense[self._row, self._col] = value.to(dense.dtype)
        return dense

    def matmul(self, other: Tensor, reduce: str = "sum") -> Tensor:
        """The product with a dense matrix."""
        if reduce not in ("sum", "add"):
            raise NotImplementedError(
                "SparseTensor: grand_fast's stand-in multiplies by sums only."
            )
        value = other.new_ones(self.nnz()) if self._value is None else self._value
        return spmm(torch.stack([self._row, self._col]), value, *self._sizes, other)

    __matmul__ = matmul
