"""stage_update: y = Σ_s c_s · y_s

Work:     one program per 1024 elements of all tensors.
Bytes:    bn(S + 1) for S tensors of n elements of b bytes: each is read once, the sum written once.
Backward: dy_s = c_s · dy, all that are asked for in one pass that reads dy once.
Order:    one writer per output element, terms summed from left to right: bitwise repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = {"BLOCK_N": 1024, "num_warps": 4}  # two loads of 128 bits a lane and tensor


@triton.jit
def _stage_update_fwd_kernel(y_ptr, terms, n, BLOCK_N: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    # A mask splits wide loads where their width does not divide n; only the last program needs one.
    if first + BLOCK_N <= n:
        y = tl.zeros([BLOCK_N], tl.float32)
        for s in tl.static_range(len(terms)):
            c, term_ptr = terms[s]
            y += c * tl.load(term_ptr + offs_n).to(tl.float32)
        tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty))
    else:
        mask = offs_n < n
        y = tl.zeros([BLOCK_N], tl.float32)
        for s in tl.static_range(len(terms)):
            c, term_ptr = terms[s]
            y += c * tl.load(term_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _stage_update_bwd_kernel(terms, dy_ptr, n, BLOCK_N: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    if first + BLOCK_N <= n:
        dy = tl.load(dy_ptr + offs_n).to(tl.float32)
        for s in tl.static_range(len(terms)):
            c, term_ptr = terms[s]
            tl.store(term_ptr + offs_n, (c * dy).to(term_ptr.dtype.element_ty))
    else:
        mask = offs_n < n
        dy = tl.load(dy_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
        for s in tl.static_range(len(terms)):
            c, term_ptr = terms[s]
            tl.store(term_ptr + offs_n, (c * dy).to(term_ptr.dtype.element_ty), mask=mask)


def stage_update_fwd(tensors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """`Σ_s scales[s] · tensors[s]` of contiguous tensors."""
    y = torch.empty_like(tensors[0])
    if y.numel():
        with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
            _stage_update_fwd_kernel[(triton.cdiv(y.numel(), _BLOCK["BLOCK_N"]),)](
                y, tuple(zip(map(float, scales), tensors, strict=True)), y.numel(), **_BLOCK
            )
    return y


def stage_update_bwd(dy: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """`scales[s] · dy` of a contiguous tensor, each."""
    grads = [torch.empty_like(dy) for _ in scales]
    if dy.numel() and grads:
        with torch.cuda.device_of(dy):  # type: ignore[no-untyped-call]
            _stage_update_bwd_kernel[(triton.cdiv(dy.numel(), _BLOCK["BLOCK_N"]),)](
                tuple(zip(map(float, scales), grads, strict=True)), dy, dy.numel(), **_BLOCK
            )
    return grads
