"""The memory check of the interpreter, on kernels with one bug each."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from ._mode import INTERPRETED, skip_module

if not INTERPRETED:
    skip_module(__file__)

from ._memory import checked_memory

N, BLOCK = 10, 4  # three programs, the last of which has lanes past the end


@triton.jit
def _double_kernel(y_ptr, x_ptr, n, IS_MASKED: tl.constexpr, STEP: tl.constexpr,
                   SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y[STEP · i + SHIFT] = 2 x[i]; a program's elements are STEP blocks apart."""
    offs = tl.program_id(0) * BLOCK * STEP + tl.arange(0, BLOCK)
    mask = offs < (n if IS_MASKED else 2 * n)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs + SHIFT, 2 * x, mask=mask)


@triton.jit
def _sum_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    """All lanes store to one element."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs * 0, tl.load(x_ptr + offs))


@triton.jit
def _again_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    """A program loads what it has stored itself."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))
    tl.store(x_ptr + offs, 2 * tl.load(y_ptr + offs))


def _double(y, x, *, masked=True, step=1, shift=0):
    with checked_memory():
        _double_kernel[(3,)](y, x, N, IS_MASKED=masked, STEP=step, SHIFT=shift, BLOCK=BLOCK)


def test_a_kernel_without_bugs_passes():
    x, y = torch.randn(N), torch.empty(N)
    _double(y, x)
    assert torch.equal(y, 2 * x)
    with checked_memory():
        _again_kernel[(2,)](y[:8], x[:8], BLOCK=BLOCK)


def test_finds_a_missing_mask_of_a_load():
    with pytest.raises(InterpreterError, match=r"load: 2 lanes out of bounds, near `x_ptr` \+ 40"):
        _double(torch.empty(2 * N), torch.randn(N), masked=False)


def test_finds_a_store_past_the_end():
    with pytest.raises(InterpreterError, match="store: 1 lanes out of bounds"):
        _double(torch.empty(N), torch.randn(N), shift=1)


def test_finds_two_lanes_that_store_to_one_element():
    text = r"store to `y_ptr` \+ 0 bytes: it was stored before"
    with pytest.raises(InterpreterError, match=text), checked_memory():
        _sum_kernel[(1,)](torch.empty(1), torch.randn(BLOCK), BLOCK=BLOCK)


def test_finds_two_programs_that_store_to_one_element():
    """All of them take the first block."""
    with pytest.raises(InterpreterError, match="it was stored before"):
        _double(torch.empty(N), torch.randn(N), step=0)


@pytest.mark.parametrize(
    ("shift", "text"),
    [(BLOCK, "load of `.*`.*: another program stores it"),
     (-BLOCK, "store to `.*`.*: another program loads it")],
    ids=["load after store", "store after load"],
)  # fmt: skip
def test_finds_programs_that_depend_on_their_order(shift, text):
    """x lies in y: what the first program stores the second loads, or the other way round."""
    y = torch.randn(3 * N)
    with pytest.raises(InterpreterError, match=text):
        _double(y, y[N : 2 * N], shift=N + shift)
