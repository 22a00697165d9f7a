"""error_ratio: r = √(mean_i (e_i / (atol + rtol · max(|x_i|, |y_i|)))²),  e = Σ_s c_s · f_s

Work:     one task per 64 Ki elements of all tensors; of small tensors, torch's own passes.
Bytes:    bn(S + 2) for S slopes of n elements of b bytes: each is read once, nothing written.
Backward: none: a step's length carries no gradient.
Order:    a task adds up its own elements in float32 or wider, 16 lanes of them; tasks are added in
          their order, in float64: bitwise repeatable for any number of threads.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grand_fast.kernels.cpu.language import Int, Kernel, Vec
from grand_fast.kernels.cpu.math import absolute, fma, maximum
from grand_fast.kernels.cpu.rows import Compiled, slabs
from grand_fast.kernels.error_ratio.reference import error_ratio_fwd as reference

_TASK_ELEMENTS = 1 << 16
_SMALL = 1 << 16  # elements: below, torch's passes in cache cost less than the start of a kernel


@lru_cache(maxsize=64)
def _error_ratio_fwd_kernel(terms: int, dtype: torch.dtype) -> Compiled:
    k = Kernel("error_ratio_fwd", dtype, torch.int64)
    x, y, tolerance = k.vector("x"), k.vector("y"), k.vector("tolerance")
    scale, squares = k.vector("scale"), k.vector("squares")
    slopes = [k.vector(f"term_{s}") for s in range(terms)]
    scales = [scale.at(s).splat() for s in range(terms)]
    rtol, atol = tolerance.at(0).splat(), tolerance.at(1).splat()

    def square(i: Int, count: Int | None) -> Vec:
        own, new, first, *rest = (
            t.at(i).load() if count is None else t.at(i).load_first(count) for t in (x, y, *slopes)
        )
        error = scales[0] * first
        for c, value in zip(scales[1:], rest, strict=True):
            error = fma(c, value, error)
        ratio = error / fma(rtol, maximum(absolute(own), absolute(new)), atol)
        return ratio * ratio

    bounds = k.longs("bounds")
    with k.tasks() as task:
        begin, end = bounds[task], bounds[task + 1]
        whole = begin + (end - begin) // k.lanes * k.lanes
        total = k.variable(k.splat(0.0))
        with k.loop(begin, whole, k.lanes) as i:
            total.value = total.value + square(i, None)
        with k.loop(whole, end, k.lanes) as i:
            total.value = total.value + square(i, end - i).first(end - i, k.splat(0.0))
        squares.at(task * k.lanes).store(total.value)
    return Compiled(k)


def error_ratio_fwd(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    x: Tensor,
    y: Tensor,
    *,
    rtol: float,
    atol: float,
) -> Tensor:
    """The ratio, a scalar in float32 or wider, of contiguous tensors alike in shape."""
    if x.numel() < _SMALL:
        return reference(tensors, scales, x, y, rtol=rtol, atol=atol)
    work = slabs(x.numel(), _TASK_ELEMENTS)
    kernel = _error_ratio_fwd_kernel(len(tensors), x.dtype)
    numpy_type = np.float32 if x.dtype == torch.float32 else np.float64
    squares = np.empty((work.bounds.numel() - 1, kernel.lanes), dtype=numpy_type)
    values: dict[str, Any] = {f"term_{s}": tensor for s, tensor in enumerate(tensors)}
    values |= {"x": x, "y": y, "squares": torch.from_numpy(squares)}
    values["scale"] = torch.from_numpy(np.array(scales, dtype=numpy_type))
    values["tolerance"] = torch.from_numpy(np.array([rtol, atol], dtype=numpy_type))
    kernel(work, pieces=False, **values)
    mean = squares.sum(dtype=np.float64) / x.numel()
    return torch.tensor(math.sqrt(mean), dtype=x.dtype, device="cpu")
