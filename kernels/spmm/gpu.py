"""spmm: y[i,h,:] = Σ_{e in row i} a[e,h] · x[col[e],h,:], or x[col[e],0,:] for all heads

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of x a turn.
Bytes:    4(N+1) + 4E + b(EH + 2NHd), b bytes per element, if each x row is read once;
          4(N+1) + 4E + b(EH + EHd + NHd) if no x row is reused. Of shared vectors b(EH + Nd + NHd),
          and b(EH + Ed + NHd). The list of pieces adds 12N.
Backward: dx by the same kernel on the CSR of Aᵀ, reading a through its slots (4E more), in float32
          and summed over heads if they share x; da[e,h] = <dy[i,h,:], x[col[e],h,:]>.
          Saves a and x.
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

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.backward_far_side import join_rows
from grand_fast.kernels.gpu.pieces import launcher, view_of
from grand_fast.kernels.gpu.sizes import score_sizes
from grand_fast.kernels.gpu.sums import add_weighted, head_dot, join_lanes, zeros
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_per_head,
    gather_rows,
    load_columns,
    load_piece,
    load_row,
    load_slots,
    store_per_head,
    store_piece,
)

# Of a gathered tile, per lane: bytes in flight against registers, as in csr_diffusion.
_VALUES = 32


@triton.jit(do_not_specialize=["n_split"])
def _spmm_fwd_kernel(
    y_ptr,
    part_ptr,
    x_ptr,
    a_ptr,
    view,
    n_split,
    stride_x_n: tl.constexpr,
    IS_SHARED: tl.constexpr,
    sizes: tl.constexpr,
):
    kind: tl.constexpr = "shared" if IS_SHARED else "heads"
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    offs_e = edge_offsets(sizes)
    sums = zeros(sizes.N_A, sizes.BLOCK_A, sizes)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j = load_columns(view, beg, e + offs_e, count)
        x = gather_rows(kind, x_ptr, j, mask_e, stride_x_n, sizes)
        slot = load_slots(view, beg, e + offs_e, mask_e)
        rows = a_ptr + slot[:, :, None].to(tl.int64) * sizes.H
        sums = add_weighted(sums, gather_per_head(rows, 0, mask_e, 0.0, sizes), x)
    store_piece("heads", y_ptr, part_ptr, join_lanes(sums), row, pid_p, n_split, sizes)


@triton.jit
def _spmm_bwd_da_kernel(
    da_ptr,
    dy_ptr,
    x_ptr,
    view,
    stride_dy_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    IS_SHARED: tl.constexpr,
    sizes: tl.constexpr,
):
    kind: tl.constexpr = "shared" if IS_SHARED else "heads"
    row, beg, count = load_piece(view, tl.program_id(0))
    offs_e = edge_offsets(sizes)
    dy = load_row("heads", dy_ptr + row * stride_dy_n, sizes)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j = load_columns(view, beg, e + offs_e, count)
        x = gather_rows(kind, x_ptr, j, mask_e, stride_x_n, sizes)
        rows = da_ptr + beg * sizes.H + (e + offs_e)[:, :, None] * sizes.H
        store_per_head(rows, head_dot(x, dy, sizes), mask_e, sizes)


@launcher
def spmm_fwd(
    x: Float[Tensor, "N K d"], a: Float[Tensor, "E H"], *, csr: Csr
) -> Float[Tensor, "N H d"]:
    """The product of the matrices `A_h`, whose values are `a` in the slot order of `csr`, with x.

    K is 1 or H.
    """
    return _product(x, a, csr, x.dtype)


@launcher
def spmm_bwd(
    dy: Float[Tensor, "N H d"],
    x: Float[Tensor, "N K d"],
    a: Float[Tensor, "E H"],
    *,
    csr: Csr,
    csr_t: Csr,
    needs_dx: bool,
    needs_da: bool,
) -> tuple[Float[Tensor, "N K d"] | None, Float[Tensor, "E H"] | None]:
    """The gradients by `x` and `a` (slot order of `csr`) that are needed."""
    (_, h, d), is_shared = dy.shape, x.shape[1] < dy.shape[1]
    dx = da = None
    if needs_dx:
        dx = _product(dy, a, csr_t, torch.float32 if is_shared else x.dtype)
        dx = dx.sum(1, keepdim=True).to(x.dtype) if is_shared else dx
    if needs_da:
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        if a.numel():
            _spmm_bwd_da_kernel[(csr.work.piece_row.numel(),)](
                da, dy, x, view=view_of(csr), stride_dy_n=dy.stride(0), stride_x_n=x.stride(0),
                IS_SHARED=is_shared, **score_sizes(h, d, x.dtype, _VALUES),
            )  # fmt: skip
    return dx, da


def _product(x: Tensor, a: Tensor, csr: Csr, dtype: torch.dtype) -> Tensor:
    """On the view of A or of Aᵀ, in `dtype`."""
    (n, heads, d), h, work = x.shape, a.shape[1], csr.work
    y = torch.empty((n, h, d), dtype=dtype, device=x.device)
    part = torch.empty((work.n_split, h * d), dtype=torch.float32, device=x.device)
    if n:
        _spmm_fwd_kernel[(work.piece_row.numel(),)](
            y, part, x, a_ptr=a, view=view_of(csr), n_split=work.n_split, stride_x_n=x.stride(0),
            IS_SHARED=heads < h, **score_sizes(h, d, x.dtype, _VALUES, per_head=True),
        )  # fmt: skip
        join_rows(y, part, csr)
    return y
