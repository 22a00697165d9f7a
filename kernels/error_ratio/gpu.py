"""error_ratio: r = √(mean_i (e_i / (atol + rtol · max(|x_i|, |y_i|)))²),  e = Σ_s c_s · f_s

Work:     one program per 16 blocks of 1024 elements of all tensors; it leaves one sum of squares.
Bytes:    bn(S + 2) for S slopes of n elements of b bytes: each is read once, nothing written.
Backward: none: a step's length carries no gradient.
Order:    a program adds its blocks in order, torch the programs' sums: bitwise repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = {"BLOCK_N": 1024, "num_warps": 4}  # two loads of 128 bits a lane and tensor
_TURNS = 16  # a program's: then its sum is a thousandth of what it reads


@triton.jit
def _load(ptr, mask, other: tl.constexpr):
    """A block as float32; `mask` may be None."""
    if mask is None:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=mask, other=other)
    return x.to(tl.float32)


@triton.jit
def _squares(terms, x_ptr, y_ptr, offs_n, mask, rtol, atol, BLOCK_N: tl.constexpr):
    """Squared ratios of a block, [BLOCK_N]; zero where the mask is off."""
    error = tl.zeros([BLOCK_N], tl.float32)
    for s in tl.static_range(len(terms)):
        c, term_ptr = terms[s]
        error += c * _load(term_ptr + offs_n, mask, 0.0)
    x = _load(x_ptr + offs_n, mask, 1.0)
    y = _load(y_ptr + offs_n, mask, 1.0)
    ratio = error / (atol + rtol * tl.maximum(tl.abs(x), tl.abs(y)))
    return ratio * ratio


@triton.jit(do_not_specialize=["rtol", "atol"])
def _error_ratio_fwd_kernel(
    squares_ptr, terms, x_ptr, y_ptr, n, rtol, atol, N_TURNS: tl.constexpr, BLOCK_N: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_N], tl.float32)
    for turn in range(N_TURNS):
        first = (pid * N_TURNS + turn) * BLOCK_N
        offs_n = first + tl.arange(0, BLOCK_N)
        # A mask splits wide loads where their width does not divide n; few blocks need one.
        if first + BLOCK_N <= n:
            total += _squares(terms, x_ptr, y_ptr, offs_n, None, rtol, atol, BLOCK_N)
        else:
            total += _squares(terms, x_ptr, y_ptr, offs_n, offs_n < n, rtol, atol, BLOCK_N)
    tl.store(squares_ptr + pid, tl.sum(total, 0))


def error_ratio_fwd(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    x: Tensor,
    y: Tensor,
    *,
    rtol: float,
    atol: float,
) -> Tensor:
    """The ratio, a scalar in float32, of contiguous tensors alike in shape."""
    n = x.numel()
    programs = triton.cdiv(n, _TURNS * _BLOCK["BLOCK_N"])
    squares = torch.empty(programs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _error_ratio_fwd_kernel[(programs,)](
            squares,
            tuple(zip(map(float, scales), tensors, strict=True)),
            x,
            y_ptr=y,
            n=n,
            rtol=float(rtol),
            atol=float(atol),
            N_TURNS=_TURNS,
            **_BLOCK,
        )
    return (squares.sum() / n).sqrt()
