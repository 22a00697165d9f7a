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

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.gpu.diffusion import (
    Field,
    field_of,
    finish_field_gradient,
    join_field,
    store_sum,
)
from grand_fast.kernels.gpu.pieces import launcher, view_of
from grand_fast.kernels.gpu.sizes import edges, load_columns, value_lanes, value_sizes
from grand_fast.kernels.gpu.sums import add_weighted, edge_dot, join_lanes, zeros
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_rows,
    load_piece,
    load_scaled,
    load_slots,
)

# Of a gathered tile, per lane: bytes in flight against registers. Next to it there is one row, the
# accumulators or df.
_VALUES = 32


@triton.jit(do_not_specialize=["n_split"])
def _csr_diffusion_fwd_kernel(field, a_ptr, view, n_split, sizes: tl.constexpr):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    offs_e = edge_offsets(sizes)
    groups = zeros(sizes.N_D, sizes.BLOCK_D, sizes)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(view.col + beg + (e + offs_e), mask=mask_e, other=0)
        x = gather_rows("values", field.x, j, mask_e, field.stride_x_n, sizes)
        if view.slot is None:
            at = a_ptr + beg + (e + offs_e)
        else:
            at = a_ptr + load_slots(view, beg, e + offs_e, mask_e)
        a = tl.load(at, mask=mask_e, other=0.0).to(tl.float32)
        groups = add_weighted(groups, (a[:, :, None],), x)
    store_sum(field, join_lanes(groups), row, pid_p, n_split, sizes)


@triton.jit
def _csr_diffusion_bwd_da_kernel(
    da_ptr,
    df_ptr,
    x_ptr,
    alpha_ptr,
    view,
    stride_df_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    sizes: tl.constexpr,
):
    row, beg, count = load_piece(view, tl.program_id(0))
    offs_e = edge_offsets(sizes)
    g = load_scaled(df_ptr + row * stride_df_n, alpha_ptr, sizes)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(view.col + beg + (e + offs_e), mask=mask_e, other=0)
        x = gather_rows("values", x_ptr, j, mask_e, stride_x_n, sizes)
        da = edge_dot(x, g, 1, sizes.VEC_D)
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
    _diffuse(field_of(f, x, alpha=alpha, beta=beta, x0=x0, add=add, csr=csr), a, csr)
    return f


@launcher
def csr_diffusion_bwd(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    *,
    alpha: Float[Tensor, " d"],
    x_scale: float = 0.0,
    csr: Csr,
    csr_t: Csr,
    needs_dx: bool,
    needs_da: bool,
    needs_dalpha: bool,
) -> tuple[Float[Tensor, "N d"] | None, Float[Tensor, " E"] | None, Float[Tensor, " d"] | None]:
    """Gradients by `x`, `a` (in the slot order of `csr`) and `alpha`, those that are needed."""
    da = dalpha = None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else None
    if needs_dalpha:
        residual = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _diffuse(field_of(residual, df, alpha=None, csr=csr_t), a, csr_t)
        dalpha = finish_field_gradient(dx, residual, x, df=df, alpha=alpha, x_scale=x_scale)
    elif dx is not None:
        add = [(x_scale, df)] if x_scale else []
        _diffuse(field_of(dx, df, alpha=alpha, add=add, csr=csr_t), a, csr_t)
    if needs_da:
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        if a.numel():
            _csr_diffusion_bwd_da_kernel[(csr.work.piece_row.numel(),)](
                da, df, x, alpha_ptr=alpha, view=view_of(csr), stride_df_n=df.stride(0),
                stride_x_n=x.stride(0), **_sizes(x.shape[1], x.dtype),
            )  # fmt: skip
    return dx, da, dalpha


def _diffuse(field: Field, a: Float[Tensor, " E"], csr: Csr) -> None:
    """Write the field of the view of A or Aᵀ."""
    (n, d), work = field.x.shape, csr.work
    if n:
        _csr_diffusion_fwd_kernel[(work.piece_row.numel(),)](
            field, a, view_of(csr), n_split=work.n_split, **_sizes(d, field.x.dtype)
        )
        join_field(field, csr)


@lru_cache(maxsize=256)
def _sizes(d: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time sizes and warps."""
    most = load_columns(dtype)
    return edges(value_sizes(d, value_lanes(d, most), most), _VALUES)
