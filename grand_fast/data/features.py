"""Node features: dense, or CSR where most of them are zero."""

import warnings

import torch
from torch import Tensor

# Of nonzeros. The encoder of sparse features is then no slower even without dropout, whose random
# numbers are most of the dense one's time, and takes less memory.
SPARSE_SHARE = 0.2


def compact(x: Tensor) -> Tensor:
    """`x [N, F]` as `torch.sparse_csr` if at most `SPARSE_SHARE` of it is nonzero, else itself."""
    if is_sparse(x) or int(x.count_nonzero()) > SPARSE_SHARE * x.numel():
        return x
    with warnings.catch_warnings():  # of a beta in torch: a user has asked for nothing of it
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return x.to_sparse_csr()


def is_sparse(x: Tensor) -> bool:
    """Whether `x` is `torch.sparse_csr`."""
    return x.layout is torch.sparse_csr


def share_stored(x: Tensor) -> float:
    """Of the elements, those that take memory."""
    return x.values().numel() / max(x.numel(), 1) if is_sparse(x) else 1.0


def chosen_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` of `x`, `[len(ids), F]`, in the layout of `x`."""
    if not is_sparse(x):
        return x[ids]
    return x.to_sparse(layout=torch.sparse_coo).index_select(0, ids).to_sparse_csr()


def normalized_rows(x: Tensor) -> Tensor:
    """Each row divided by its sum, where that is above 1."""
    if not is_sparse(x):
        return x / x.sum(dim=1, keepdim=True).clamp(min=1.0)
    rowptr, col, values = x.crow_indices(), x.col_indices(), x.values()
    rows = torch.repeat_interleave(rowptr.diff())
    sums = values.new_zeros(x.shape[0]).index_add(0, rows, values).clamp(min=1.0)
    return torch.sparse_csr_tensor(
        rowptr, col, values / sums[rows], size=x.shape, check_invariants=False
    )


def plain_arrays(x: Tensor) -> list[Tensor]:
    """Dense tensors that tell all of `x`."""
    if not is_sparse(x):
        return [x]
    return [torch.tensor(x.shape), x.crow_indices(), x.col_indices(), x.values()]
