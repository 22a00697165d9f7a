"""stage_update: y = Σ_s c_s · y_s

Work:     one task per 64 Ki elements of all tensors; of small tensors, torch's own passes.
Bytes:    bn(S + 1) for S tensors of n elements of b bytes: each is read once, the sum written once,
          past the caches.
Backward: dy_s = c_s · dy, all that are asked for in one pass that reads dy once.
Order:    one writer per output element, terms summed from left to right: bitwise repeatable for any
          number of threads.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grand_fast.kernels.cpu.language import Floats, Int, Kernel, Vec
from grand_fast.kernels.cpu.math import fma
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, slabs

_TASK_ELEMENTS = 1 << 16  # some 0.05 ms; whole registers of any type
# A result that no cache holds is written past them: a store would first read what it overwrites.
# Below, torch's passes in cache cost less than the start of a kernel.
_LARGE_BYTES = 8 << 20


def _terms(k: Kernel, count: int) -> tuple[list[Floats], list[Vec]]:
    """The tensors that the kernel reads or writes, and the scale of each."""
    scale = k.vector("scale")
    tensors = [k.vector(f"term_{s}") for s in range(count)]
    return tensors, [scale.at(s).splat() for s in range(count)]


@lru_cache(maxsize=64)
def _stage_update_fwd_kernel(terms: int, dtype: torch.dtype) -> Compiled:
    k = Kernel("stage_update_fwd", dtype, torch.int64)
    y, (tensors, scales) = k.vector("y"), _terms(k, terms)

    def total(i: Int, count: Int | None) -> Vec:
        first, *rest = (t.at(i).load() if count is None else t.at(i).load_first(count)
                        for t in tensors)  # fmt: skip
        total = scales[0] * first
        for c, value in zip(scales[1:], rest, strict=True):
            total = fma(c, value, total)
        return total

    bounds = k.longs("bounds")
    with k.tasks() as task:
        begin, end = bounds[task], bounds[task + 1]
        whole = begin + (end - begin) // k.lanes * k.lanes
        with k.loop(begin, whole, k.lanes) as i:
            y.at(i).store(total(i, None), streams=True)
        with k.loop(whole, end, k.lanes) as i:
            y.at(i).store_first(total(i, end - i), end - i)
    return Compiled(k)


@lru_cache(maxsize=64)
def _stage_update_bwd_kernel(terms: int, dtype: torch.dtype) -> Compiled:
    k = Kernel("stage_update_bwd", dtype, torch.int64)
    dy, (grads, scales) = k.vector("dy"), _terms(k, terms)
    bounds = k.longs("bounds")
    with k.tasks() as task:
        begin, end = bounds[task], bounds[task + 1]
        whole = begin + (end - begin) // k.lanes * k.lanes
        with k.loop(begin, whole, k.lanes) as i:
            value = dy.at(i).load()
            for c, grad in zip(scales, grads, strict=True):
                grad.at(i).store(c * value, streams=True)
        with k.loop(whole, end, k.lanes) as i:
            value = dy.at(i).load_first(end - i)
            for c, grad in zip(scales, grads, strict=True):
                grad.at(i).store_first(c * value, end - i)
    return Compiled(k)


def stage_update_fwd(tensors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """`Σ_s scales[s] · tensors[s]` of contiguous tensors."""
    if not _is_large(tensors[0]):
        y = tensors[0] * scales[0]
        for tensor, scale in zip(tensors[1:], scales[1:], strict=True):
            y.add_(tensor, alpha=scale)
        return y
    y = empty(*tensors[0].shape, dtype=tensors[0].dtype)
    _run(_stage_update_fwd_kernel(len(tensors), y.dtype), tensors, scales, y=y)
    return y


def stage_update_bwd(dy: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """`scales[s] · dy` of a contiguous tensor, each."""
    if not _is_large(dy):
        return [dy * scale for scale in scales]
    grads = [empty(*dy.shape, dtype=dy.dtype) for _ in scales]
    if grads:
        _run(_stage_update_bwd_kernel(len(grads), dy.dtype), grads, scales, dy=dy)
    return grads


def _is_large(y: Tensor) -> bool:
    return y.numel() * y.element_size() >= _LARGE_BYTES


def _run(
    kernel: Compiled, tensors: Sequence[Tensor], scales: Sequence[float], **other: Tensor
) -> None:
    values: dict[str, Any] = {f"term_{s}": tensor for s, tensor in enumerate(tensors)} | other
    values["scale"] = torch.tensor(scales, dtype=tensors[0].dtype, device="cpu")
    kernel(slabs(tensors[0].numel(), _TASK_ELEMENTS), pieces=False, **values)
