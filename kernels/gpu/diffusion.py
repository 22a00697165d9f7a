"""The end of a diffusion: what is stored of a row once its weighted sum is known; and dalpha."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.gpu.sizes import Sizes, load_columns, value_lanes, value_sizes
from grand_fast.kernels.gpu.sums import join
from grand_fast.kernels.gpu.tiles import load_split, row_columns, store_row

_ROWS = 128  # one program adds up their share of dalpha, and writes 1/128 of a tensor for it


class Field(NamedTuple):
    """f = alpha (A x − x) + beta x0 + Σ_s c_s y_s, as one argument of kernels.

    f: [N, d], contiguous. part: [P, d], sums of the pieces of split rows. alpha: None counts as 1.
    beta and x0: None without a source. add: pairs (c_s, y_s), of tensors whose rows lie d apart.
    """

    f: Tensor
    part: Tensor
    x: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    x0: Tensor | None
    add: Add
    stride_x_n: tl.constexpr
    stride_x0_n: tl.constexpr


def field_of(
    f: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    *,
    alpha: Float[Tensor, " d"] | None,
    beta: Float[Tensor, " d"] | None = None,
    x0: Float[Tensor, "N d"] | None = None,
    add: Add = (),
    csr: Csr,
) -> Field:
    """Of a sum over the edges of `csr`, to be written to `f`."""
    part = torch.empty((csr.work.n_split, x.shape[1]), dtype=torch.float32, device=x.device)
    pairs = tuple((float(c), y.contiguous()) for c, y in add)
    strides = (tl.constexpr(0 if t is None else t.stride(0)) for t in (x, x0))
    return Field(f, part, x, alpha, beta, x0, pairs, *strides)


@triton.jit
def store_field(field, ax, row, sizes: tl.constexpr):
    """f of one row from its Σ w x, ax, in N_D chunks [BLOCK_D]."""
    # All is loaded before anything is stored: behind a store, which it might concern, a load waits.
    row_f = ()
    for chunk in tl.static_range(sizes.N_D):
        offs, mask = row_columns("values", chunk, sizes)
        at = field.x + row * field.stride_x_n + offs
        f = tl.reshape(ax[chunk], offs.shape) - tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if field.alpha is not None:
            f *= tl.load(field.alpha + offs, mask=mask, other=0.0)
        if field.x0 is not None:
            at = field.x0 + row * field.stride_x0_n + offs
            x0 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            f += tl.load(field.beta + offs, mask=mask, other=0.0) * x0
        for s in tl.static_range(len(field.add)):
            c, y_ptr = field.add[s]
            f += c * tl.load(y_ptr + row * sizes.d + offs, mask=mask, other=0.0).to(tl.float32)
        row_f = row_f + (tl.reshape(f.to(field.f.dtype.element_ty), [sizes.BLOCK_D]),)
    store_row("values", field.f + row * sizes.d, row_f, sizes)


@triton.jit
def store_sum(field, ax, row, pid_p, n_split, sizes: tl.constexpr):
    """f of a row from its Σ w x, or that sum of one of its pieces."""
    if pid_p < n_split:
        store_row("values", field.part + pid_p * sizes.d, ax, sizes)
    else:
        store_field(field, ax, row, sizes)


@triton.jit
def _csr_diffusion_fwd_join_kernel(field, split_row_ptr, split_ptr_ptr, sizes: tl.constexpr):
    row, first, last = load_split(split_row_ptr, split_ptr_ptr)
    ax = ()
    for c in tl.static_range(sizes.N_D):
        offs, mask = row_columns("values", c, sizes)
        total = join(field.part, first, last, offs, mask, sizes.d)
        ax = ax + (tl.reshape(total, [sizes.BLOCK_D]),)
    store_field(field, ax, row, sizes)


def join_field(field: Field, csr: Csr) -> None:
    """Write the rows of `f` that have several pieces."""
    work = csr.work
    if work.n_split:
        _csr_diffusion_fwd_join_kernel[(work.split_row.numel(),)](
            field, work.split_row, work.split_ptr, **_join_sizes(field.x.shape[1])
        )


@lru_cache(maxsize=256)
def _join_sizes(d: int) -> dict[str, Any]:
    most = load_columns(torch.float32)  # the type of the partial sums
    lanes = value_lanes(d, most)
    return {"sizes": Sizes(value_sizes(d, lanes, most)), "num_warps": max(1, lanes // 32)}


@triton.jit(do_not_specialize=["n"])
def _csr_diffusion_bwd_dalpha_kernel(
    dx_ptr,
    part_ptr,
    residual_ptr,
    x_ptr,
    df_ptr,
    alpha_ptr,
    n,
    stride_x_n: tl.constexpr,
    stride_df_n: tl.constexpr,
    x_scale,
    d: tl.constexpr,
    N_TURNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    offs_n = pid_n * (N_TURNS * BLOCK_N) + tl.arange(0, BLOCK_N)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    alpha = tl.load(alpha_ptr + offs_d, mask=mask_d, other=0.0)
    dalpha = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for turn in range(N_TURNS):
        row = offs_n + turn * BLOCK_N
        mask = (row < n) & mask_d
        residual = tl.load(residual_ptr + row * d + offs_d, mask=mask, other=0.0)
        x = tl.load(x_ptr + row * stride_x_n + offs_d, mask=mask, other=0.0).to(tl.float32)
        dalpha += x * residual
        if dx_ptr is not None:
            dx = alpha * residual
            if df_ptr is not None:
                df = tl.load(df_ptr + row * stride_df_n + offs_d, mask=mask, other=0.0)
                dx += x_scale * df.to(tl.float32)
            tl.store(dx_ptr + row * d + offs_d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + pid_n * d + offs_d, tl.sum(dalpha, 0), mask=mask_d)


def finish_field_gradient(
    dx: Float[Tensor, "N d"] | None,
    residual: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    *,
    df: Float[Tensor, "N d"],
    alpha: Float[Tensor, " d"],
    x_scale: float,
) -> Float[Tensor, " d"]:
    """Write `dx`, if it is given, and return dalpha, from the residual `Aᵀ df − df`.

    dx = alpha · residual + x_scale · df; dalpha[d] = Σ_j x_j · residual_j. One pass over them.
    """
    n, d = x.shape
    block_d = triton.next_power_of_2(d)
    block_n = max(1, 1024 // block_d)  # 8 elements of each tensor a lane: with 16, sm_100 spills
    programs = triton.cdiv(n, _ROWS)
    part = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    if n:
        _csr_diffusion_bwd_dalpha_kernel[(programs,)](
            dx,
            part,
            residual,
            x_ptr=x,
            df_ptr=df if x_scale else None,
            alpha_ptr=alpha,
            n=n,
            stride_x_n=x.stride(0),
            stride_df_n=df.stride(0),
            x_scale=x_scale,
            d=d,
            N_TURNS=triton.cdiv(_ROWS, block_n),
            BLOCK_N=min(block_n, _ROWS),
            BLOCK_D=block_d,
            num_warps=4,
        )
    return part.sum(0)
