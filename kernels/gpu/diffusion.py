"""The end of a diffusion: what is stored of a row once its weighted sum is known."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.gpu.sizes import load_columns, value_lanes, value_sizes
from grand_fast.kernels.gpu.sums import join
from grand_fast.kernels.gpu.tiles import value_columns

_ROWS = 128  # one program adds up their share of dalpha, and writes 1/128 of a tensor for it


@triton.jit
def store_diffusion(
    f_ptr,
    ax,
    x_ptr,
    alpha_ptr,
    beta_ptr,
    x0_ptr,
    add,
    row,
    stride_f_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_x0_n: tl.constexpr,
    d: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
):
    """f = alpha (ax − x) + beta x0 + Σ_s c_s y_s of one row; ax in N_D chunks [BLOCK_D].

    `add` holds the pairs (c_s, y_s_ptr). Without IS_SCALED alpha counts as 1.
    """
    # All is loaded before anything is stored: behind a store, which it might concern, a load waits.
    row_f = ()
    for chunk in tl.static_range(N_D):
        offs, mask = value_columns(chunk, d, BLOCK_D, VEC_D)
        x = tl.load(x_ptr + row * stride_x_n + offs, mask=mask, other=0.0).to(tl.float32)
        f = tl.reshape(ax[chunk], offs.shape) - x
        if IS_SCALED:
            f *= tl.load(alpha_ptr + offs, mask=mask, other=0.0)
        if HAS_SOURCE:
            x0 = tl.load(x0_ptr + row * stride_x0_n + offs, mask=mask, other=0.0).to(tl.float32)
            f += tl.load(beta_ptr + offs, mask=mask, other=0.0) * x0
        for s in tl.static_range(len(add)):
            c, y_ptr = add[s]
            f += c * tl.load(y_ptr + row * d + offs, mask=mask, other=0.0).to(tl.float32)
        row_f = row_f + (tl.reshape(f.to(f_ptr.dtype.element_ty), [BLOCK_D]),)
    store_values(f_ptr + row * stride_f_n, row_f, d, BLOCK_D, VEC_D, N_D)


@triton.jit
def store_values(row_ptr, x, d: tl.constexpr, BLOCK_D: tl.constexpr, VEC_D: tl.constexpr,
                 N_D: tl.constexpr):  # fmt: skip
    """Write a row, given in N_D chunks [BLOCK_D]."""
    for c in tl.static_range(N_D):
        offs, mask = value_columns(c, d, BLOCK_D, VEC_D)
        tl.store(row_ptr + offs, tl.reshape(x[c], offs.shape), mask=mask)


@triton.jit
def _csr_diffusion_fwd_join_kernel(
    f_ptr,
    part_ptr,
    x_ptr,
    alpha_ptr,
    beta_ptr,
    x0_ptr,
    add,
    split_row_ptr,
    split_ptr_ptr,
    stride_f_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_x0_n: tl.constexpr,
    d: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    ax = ()
    for c in tl.static_range(N_D):
        offs, mask = value_columns(c, d, BLOCK_D, VEC_D)
        ax = ax + (tl.reshape(join(part_ptr, first, last, offs, mask, d), [BLOCK_D]),)
    store_diffusion(
        f_ptr, ax, x_ptr, alpha_ptr, beta_ptr, x0_ptr, add, row, stride_f_n, stride_x_n,
        stride_x0_n, d, HAS_SOURCE, IS_SCALED, BLOCK_D, VEC_D, N_D,
    )  # fmt: skip


def join_diffusion(
    f: Float[Tensor, "N d"],
    part: Float[Tensor, "P d"],
    x: Float[Tensor, "N d"],
    *,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add,
    csr: Csr,
    is_scaled: bool,
) -> None:
    """Write the rows of `f` that have several pieces, from their partial sums `part`."""
    work, d = csr.work, x.shape[1]
    if work.n_split == 0:
        return
    most = load_columns(torch.float32)  # the type of the partial sums
    lanes = value_lanes(d, most)
    _csr_diffusion_fwd_join_kernel[(work.split_row.numel(),)](
        f,
        part,
        x,
        alpha_ptr=alpha,
        beta_ptr=beta,
        x0_ptr=x0,
        add=dense(add),
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        stride_f_n=f.stride(0),
        stride_x_n=x.stride(0),
        stride_x0_n=0 if x0 is None else x0.stride(0),
        d=d,
        HAS_SOURCE=x0 is not None,
        IS_SCALED=is_scaled,
        **value_sizes(d, lanes, most),
        num_warps=max(1, lanes // 32),
    )


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
    df_scale,
    d: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DF: tl.constexpr,
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
        if HAS_DX:
            dx = alpha * residual
            if HAS_DF:
                df = tl.load(df_ptr + row * stride_df_n + offs_d, mask=mask, other=0.0)
                dx += df_scale * df.to(tl.float32)
            tl.store(dx_ptr + row * d + offs_d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + pid_n * d + offs_d, tl.sum(dalpha, 0), mask=mask_d)


def finish_field_gradient(
    dx: Float[Tensor, "N d"] | None,
    residual: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    *,
    df: Float[Tensor, "N d"],
    alpha: Float[Tensor, " d"],
    df_scale: float,
) -> Float[Tensor, " d"]:
    """Write `dx`, if it is given, and return dalpha, from the residual `Aᵀ df − df`.

    dx = alpha · residual + df_scale · df; dalpha[d] = Σ_j x_j · residual_j. One pass over them.
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
            df_ptr=df,
            alpha_ptr=alpha,
            n=n,
            stride_x_n=x.stride(0),
            stride_df_n=df.stride(0),
            df_scale=df_scale,
            d=d,
            HAS_DX=dx is not None,
            HAS_DF=df_scale != 0.0,
            N_TURNS=triton.cdiv(_ROWS, block_n),
            BLOCK_N=min(block_n, _ROWS),
            BLOCK_D=block_d,
            num_warps=4,
        )
    return part.sum(0)


def dense(add: Add) -> Add:
    """`add` as kernels take it, a tuple of tensors whose rows lie `d` elements apart."""
    return tuple((float(c), y.contiguous()) for c, y in add)
