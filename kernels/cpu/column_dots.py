"""`Σ_i a[i,:] · b[i,:]`, column by column.

Work:     one task per slab of rows, sums in registers; slabs depend on N alone.
Bytes:    2bNd, b bytes per element.
Order:    rows in order, then slabs: bitwise repeatable for any number of threads.
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.cpu.language import Kernel, chunks
from grand_fast.kernels.cpu.math import fma
from grand_fast.kernels.cpu.rows import Compiled, Shares, slabs

_SLABS = 64  # at most: enough tasks for the threads, few partial sums
_SLAB_ROWS = 128  # at least
_PANEL = 4  # registers of columns at a time


@lru_cache(maxsize=64)
def _column_dots_kernel(columns: int, dtype: torch.dtype) -> Compiled:
    k = Kernel("column_dots", dtype, torch.int64)
    a, b, bounds, share = k.matrix("a"), k.matrix("b"), k.longs("bounds"), k.matrix("share")
    whole = chunks(columns, k.lanes)
    with k.tasks() as task:
        for start in range(0, len(whole), _PANEL):
            panel = whole[start : start + _PANEL]
            sums = [k.variable(k.splat(0.0)) for _ in panel]
            with k.loop(bounds[task], bounds[task + 1]) as i:
                for c, total in zip(panel, sums, strict=True):
                    left, right = (m.row(i).at(c.start).load(c.lanes) for m in (a, b))
                    total.value = fma(left, right, total.value)
            for c, total in zip(panel, sums, strict=True):
                share.row(task).at(c.start).store(total.value, c.lanes)
    return Compiled(k)


def column_dots(a: Float[Tensor, "N d"], b: Float[Tensor, "N d"]) -> Float[Tensor, " d"]:
    """The sums, in the type of `a`, of tensors with contiguous rows."""
    n, d = a.shape
    work = slabs(n, max(_SLAB_ROWS, -(-n // _SLABS)))
    shares = Shares(work.bounds.numel() - 1, d, a.dtype)
    _column_dots_kernel(d, a.dtype)(work, pieces=False, a=a, b=b, share=shares.tensor)
    return shares.total()
