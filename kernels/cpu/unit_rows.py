"""Vectors of length 1, `u[i,h] = v[i,h] / max(|v[i,h]|, eps)`, and their backward in place.

Work:     one task per slab of rows; a vector in registers at a time.
Bytes:    2bNHd_k, b bytes per element; backward 4bNHd_k.
Order:    a vector's squares in one order: bitwise repeatable for any number of threads.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.cpu.language import Floats, Kernel, Vec, chunks
from grand_fast.kernels.cpu.math import add, butterfly, fma, sqrt, where_positive
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, slabs

_SLAB_ELEMENTS = 1 << 14  # some 0.01 ms


@lru_cache(maxsize=64)
def _unit_rows_kernel(
    h: int, d_k: int, dtype: torch.dtype, *, eps: float, backward: bool
) -> Compiled:
    k = Kernel("unit_rows_bwd" if backward else "unit_rows_fwd", dtype, torch.int64)
    v, unit, bounds = k.matrix("v"), k.matrix("unit"), k.longs("bounds")
    least, parts = k.splat(eps), chunks(d_k, k.lanes)

    def dot(a: Floats, b: Floats) -> Vec:
        total = k.splat(0.0)
        for c in parts:
            total = fma(a.at(c.start).load(c.lanes), b.at(c.start).load(c.lanes), total)
        return butterfly(total, add, 1, k.lanes)

    with k.tasks() as task, k.loop(bounds[task], bounds[task + 1]) as i, k.loop(0, h) as head:
        own, own_unit = v.row(i).at(head * d_k), unit.row(i).at(head * d_k)
        length = sqrt(dot(own, own))
        divisor = where_positive(least - length, least, length)  # NaN stays
        if backward:
            own_grad = k.matrix("grad").row(i).at(head * d_k)
            along = where_positive(least - length, k.splat(0.0), dot(own_unit, own_grad))
        for c in parts:
            if backward:
                place = own_grad.at(c.start)
                across = place.load(c.lanes) - own_unit.at(c.start).load(c.lanes) * along
                place.store(across / divisor, c.lanes)
            else:
                own_unit.at(c.start).store(own.at(c.start).load(c.lanes) / divisor, c.lanes)
    return Compiled(k)


def unit_rows_fwd(v: Float[Tensor, "N H d_k"], *, eps: float) -> Float[Tensor, "N H d_k"]:
    """`u`, contiguous, of a tensor whose rows `[H, d_k]` are."""
    unit = empty(*v.shape, dtype=v.dtype)
    _run(v, unit, eps=eps)
    return unit


def unit_rows_bwd(
    grad: Float[Tensor, "N H d_k"],
    v: Float[Tensor, "N H d_k"],
    unit: Float[Tensor, "N H d_k"],
    *,
    eps: float,
) -> None:
    """The gradient by `v` in place of `grad`, that by `unit`. Rows of all are contiguous."""
    _run(v, unit, grad, eps=eps)


def _run(v: Tensor, unit: Tensor, grad: Tensor | None = None, *, eps: float) -> None:
    n, h, d_k = v.shape
    kernel = _unit_rows_kernel(h, d_k, v.dtype, eps=eps, backward=grad is not None)
    work = slabs(n, max(1, _SLAB_ELEMENTS // max(1, h * d_k)))
    given: dict[str, Any] = {} if grad is None else {"grad": grad}
    kernel(work, pieces=False, v=v, unit=unit, **given)
