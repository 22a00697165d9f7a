"""csr_diffusion: f[i,:] = alpha · (Σ_{e in row i} a[e] · x[col[e],:] − x[i,:]) + beta · x0[i,:]

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of x a turn.
Bytes:    4(N+1) + 4E + b(E + 2Nd), b bytes per element, if each x row is read once;
          4(N+1) + 4E + b(E + Ed + 2Nd) if no x row is reused; b·Nd more with a source; the list of
          pieces adds 12N.
Backward: dx by the same kernel on the CSR of Aᵀ, reading a through its slots (4E more);
          da[e] = <alpha · df[i], x[col[e]]>, one dot product per edge. Saves a and x.
          dalpha[d] = Σ_j x_j · (Aᵀ df − df)_j, by a pass over N that also scales dx (the bracket is
          stored in float32 in between: 8Nd + b·Nd bytes more).
Order:    one writer per output element; edges summed in CSR order, pieces of a hub in theirs:
          bitwise repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.gpu.diffusion import (
    dense,
    finish_field_gradient,
    join_diffusion,
    store_diffusion,
    store_values,
)
from grand_fast.kernels.gpu.pieces import launcher
from grand_fast.kernels.gpu.sizes import edges, load_columns, value_lanes, value_sizes
from grand_fast.kernels.gpu.sums import add_weighted, edge_dot, join_lanes, products, zeros
from grand_fast.kernels.gpu.tiles import edge_offsets, gather_values, load_piece, load_values

# Of a gathered tile, per lane: bytes in flight against registers. Next to it there is one row, the
# accumulators or df.
_VALUES = 32


@triton.jit(do_not_specialize=["n_split"])
def _csr_diffusion_fwd_kernel(
    f_ptr,
    part_ptr,
    x_ptr,
    a_ptr,
    alpha_ptr,
    beta_ptr,
    x0_ptr,
    add,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_f_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_x0_n: tl.constexpr,
    d: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    groups = zeros(N_D, BLOCK_G, BLOCK_D)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        x = gather_values(x_ptr, j, mask_e, stride_x_n, d, BLOCK_D, VEC_D, N_D)
        if HAS_SLOT:
            at = a_ptr + tl.load(slot_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        else:
            at = a_ptr + beg + (e + offs_e)
        a = tl.load(at, mask=mask_e, other=0.0).to(tl.float32)
        groups = add_weighted(groups, (a[:, :, None],), x, 1)
    ax = join_lanes(groups)
    if pid_p < n_split:
        store_values(part_ptr + pid_p * d, ax, d, BLOCK_D, VEC_D, N_D)
    else:
        store_diffusion(
            f_ptr, ax, x_ptr, alpha_ptr, beta_ptr, x0_ptr, add, row, stride_f_n, stride_x_n,
            stride_x0_n, d, HAS_SOURCE, IS_SCALED, BLOCK_D, VEC_D, N_D,
        )  # fmt: skip


@triton.jit
def _csr_diffusion_bwd_da_kernel(
    da_ptr,
    df_ptr,
    x_ptr,
    alpha_ptr,
    col_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    stride_df_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0)
    row, beg, count = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    df = load_values(df_ptr + row * stride_df_n, d, BLOCK_D, VEC_D, N_D)
    g = products(df, load_values(alpha_ptr, d, BLOCK_D, VEC_D, N_D))
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        x = gather_values(x_ptr, j, mask_e, stride_x_n, d, BLOCK_D, VEC_D, N_D)
        da = edge_dot(x, g, 1, VEC_D)
        tl.store(da_ptr + beg + (e + offs_e), da.to(da_ptr.dtype.element_ty), mask=mask_e)


@launcher
def csr_diffusion_fwd(
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    *,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add = (),
    csr: Csr,
) -> Float[Tensor, "N d"]:
    """The vector field of a diffusion with given weights `a`, in the slot order of `csr`."""
    f = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _diffuse(f, x, a, alpha=alpha, beta=beta, x0=x0, add=add, csr=csr, is_scaled=True)
    return f


@launcher
def csr_diffusion_bwd(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    *,
    alpha: Float[Tensor, " d"],
    df_scale: float = 0.0,
    csr: Csr,
    csr_t: Csr,
    needs_dx: bool,
    needs_da: bool,
    needs_dalpha: bool,
) -> tuple[Float[Tensor, "N d"] | None, Float[Tensor, " E"] | None, Float[Tensor, " d"] | None]:
    """Gradients by `x`, `a` (in the slot order of `csr`) and `alpha`, those that are needed."""
    dx = da = dalpha = None
    if needs_dalpha:
        residual = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _diffuse(
            residual, df, a, alpha=alpha, beta=None, x0=None, add=(), csr=csr_t, is_scaled=False
        )
        if needs_dx:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dalpha = finish_field_gradient(dx, residual, x, df=df, alpha=alpha, df_scale=df_scale)
    elif needs_dx:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        add = [(df_scale, df)] if df_scale else []
        _diffuse(dx, df, a, alpha=alpha, beta=None, x0=None, add=add, csr=csr_t, is_scaled=True)
    if needs_da:
        da = _bwd_da(df, x, a, alpha=alpha, csr=csr)
    return dx, da, dalpha


def _diffuse(
    f: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    *,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add,
    csr: Csr,
    is_scaled: bool,
) -> None:
    """f = alpha (A x − x) + beta x0 + Σ c y, alpha left out at will, for the view of A or Aᵀ."""
    work, d = csr.work, x.shape[1]
    if x.shape[0] == 0:
        return
    part = torch.empty((work.n_split, d), dtype=torch.float32, device=x.device)
    _csr_diffusion_fwd_kernel[(work.piece_row.numel(),)](
        f,
        part,
        x,
        a_ptr=a,
        alpha_ptr=alpha,
        beta_ptr=beta,
        x0_ptr=x0,
        add=dense(add),
        col_ptr=csr.col,
        slot_ptr=csr.slot,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_f_n=f.stride(0),
        stride_x_n=x.stride(0),
        stride_x0_n=0 if x0 is None else x0.stride(0),
        d=d,
        HAS_SLOT=csr.slot is not None,
        HAS_SOURCE=x0 is not None,
        IS_SCALED=is_scaled,
        **_sizes(d, x.dtype),
    )
    join_diffusion(f, part, x, alpha=alpha, beta=beta, x0=x0, add=add, csr=csr, is_scaled=is_scaled)


def _bwd_da(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    *,
    alpha: Float[Tensor, " d"],
    csr: Csr,
) -> Float[Tensor, " E"]:
    work, d = csr.work, x.shape[1]
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if a.numel() == 0:
        return da
    _csr_diffusion_bwd_da_kernel[(work.piece_row.numel(),)](
        da,
        df,
        x,
        alpha_ptr=alpha,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        stride_df_n=df.stride(0),
        stride_x_n=x.stride(0),
        d=d,
        **_sizes(d, x.dtype),
    )
    return da


def _sizes(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time sizes and warps."""
    most = load_columns(dtype)
    lanes = value_lanes(d, most)
    sizes = value_sizes(d, lanes, most)
    return sizes | edges(sizes, lanes, _VALUES)
