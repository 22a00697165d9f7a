"""The column pass of the backward of `attention_diffusion`: dk and dx, see `diffusion_backward.py`.

With them the gradients of edge weights, which need Delta, and by the largest score.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.gpu.attention.backward import (
    add_scores,
    all_scores,
    join_dk,
    store_heads,
)
from grand_fast.kernels.gpu.attention.diffusion_backward import add_values, sizes_of, store_dx
from grand_fast.kernels.gpu.attention.scores import gather_norm
from grand_fast.kernels.gpu.attention.weighting import (
    KernelWeighting,
    edge_weight_gradient,
    load_edge_weight,
    load_slots,
    load_top,
    past_function,
    past_normalizer,
    scores,
    weight,
)
from grand_fast.kernels.gpu.diffusion import dense, join_diffusion
from grand_fast.kernels.gpu.sizes import edges
from grand_fast.kernels.gpu.sums import (
    add_weighted,
    edge_dot,
    head_dot,
    join_lanes,
    products,
    scaled,
    zeros,
)
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_heads,
    gather_per_head,
    gather_values,
    load_heads,
    load_piece,
    load_values,
)

# Of the gathered tiles, per lane; registers have other uses here.
_VALUES = 24


@triton.jit(do_not_specialize=["n_split"])
def _attention_diffusion_bwd_dk_kernel(
    dx_ptr,
    dk_ptr,
    dw_ptr,
    dtop_ptr,
    part_x_ptr,
    part_k_ptr,
    df_ptr,
    x_ptr,
    q_ptr,
    k_ptr,
    norm_ptr,
    alpha_ptr,
    add,
    weighting,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_dx_n: tl.constexpr,
    stride_df_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    scale,
    d: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DW: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    k = load_heads(k_ptr + row * stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
    top = load_top(weighting)
    k_groups = ()
    top_groups = ()
    if HAS_DK:
        x = load_values(x_ptr + row * stride_x_n, d, BLOCK_D, VEC_D, N_D)
        x = products(x, load_values(alpha_ptr, d, BLOCK_D, VEC_D, N_D))
        k_groups = zeros(N_A, BLOCK_G, BLOCK_A)
        if weighting.top is not None:
            top_groups = zeros(N_H, BLOCK_G, BLOCK_H)
    x_groups = ()
    if HAS_DX:
        x_groups = zeros(N_D, BLOCK_G, BLOCK_D)
    i_next = tl.load(col_ptr + beg + offs_e, mask=offs_e < count, other=0)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        i = i_next
        behind = e + (BLOCK_E * BLOCK_G + offs_e)
        i_next = tl.load(col_ptr + beg + behind, mask=behind < count, other=0)
        q = gather_heads(q_ptr, i, mask_e, stride_q_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        df = gather_values(df_ptr, i, mask_e, stride_df_n, d, BLOCK_D, VEC_D, N_D)
        slot = load_slots(slot_ptr, beg, e + offs_e, mask_e)
        w = load_edge_weight(weighting, slot, mask_e)
        u = head_dot(q, k, BLOCK_H, N_H, VEC_A)
        s = scores(u, w, weighting)
        # With Delta in its rows `norm` is of the row pass, else of forward.
        stride_norm_n: tl.constexpr = (2 + HAS_DK) * H
        shift, inverse = gather_norm(
            norm_ptr, i, mask_e, weighting, stride_norm_n, HAS_DK, H, BLOCK_H, N_H
        )
        a = ()
        for h in tl.static_range(N_H):
            # [BLOCK_E, BLOCK_G, BLOCK_H]
            a = a + (weight(s[h], shift[h], inverse[h], weighting, top),)
        if HAS_DK:
            t = edge_dot(df, x, BLOCK_H, VEC_D)[:, :, None]
            rows = norm_ptr + i[:, :, None].to(tl.int64) * stride_norm_n
            delta = gather_per_head(rows, 2 * H, mask_e, 0.0, H, BLOCK_H, N_H)
            ds = ()
            du = ()
            for h in tl.static_range(N_H):
                ds_h = past_normalizer(a[h] * (t - delta[h]), s[h], weighting, top)
                ds = ds + (ds_h,)
                du = du + (past_function(ds_h, u[h], w, weighting),)
            k_groups = add_weighted(k_groups, du, q, BLOCK_H)
            if HAS_DW:
                dw = edge_weight_gradient(ds, u, weighting) / H
                tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=mask_e)
            if weighting.top is not None:
                top_groups = add_scores(top_groups, ds)
        if HAS_DX:
            x_groups = add_values(x_groups, a, df)
    if HAS_DX:
        ax = scaled(join_lanes(x_groups), 1 / H)
        store_dx(
            dx_ptr, part_x_ptr, ax, df_ptr, alpha_ptr, add, row, pid_p, n_split, stride_dx_n,
            stride_df_n, d, IS_SCALED, BLOCK_D, VEC_D, N_D,
        )  # fmt: skip
    if HAS_DK:
        dk = scaled(join_lanes(k_groups), scale)
        if pid_p < n_split:
            store_heads(part_k_ptr + pid_p * (H * d_k), dk, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        else:
            store_heads(dk_ptr + row * (H * d_k), dk, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        if weighting.top is not None:
            tl.store(dtop_ptr + pid_p, all_scores(top_groups))


def bwd_dk(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    norm: Float[Tensor, "N 2 H"],
    norm_delta: Float[Tensor, "N 3 H"] | None,
    weighting: KernelWeighting,
    alpha: Float[Tensor, " d"],
    csr: Csr,
    dx: Float[Tensor, "N d"] | None = None,
    add: Add = (),
    is_scaled: bool = True,
    needs_dedge_weight: bool,
) -> tuple[Float[Tensor, "N H d_k"] | None, Float[Tensor, " E"] | None, Float[Tensor, ""] | None]:
    """The column pass: dk, dedge_weight and dtop if `norm_delta` is given.

    Writes `dx` if it is given, without alpha if not `is_scaled`.
    """
    work, d, (n, h, d_k) = csr.work, x.shape[1], q.shape
    programs = work.piece_row.numel()
    dk = part_k = dw = part_top = None
    if norm_delta is not None:
        norm = norm_delta
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        part_k = torch.empty((work.n_split, h * d_k), dtype=torch.float32, device=k.device)
        edge_weight = weighting.edge_weight
        if needs_dedge_weight and edge_weight is not None:
            dw = torch.empty(edge_weight.shape, dtype=edge_weight.dtype, device=k.device)
        if weighting.top is not None:
            part_top = torch.empty((programs,), dtype=torch.float32, device=k.device)
    if n == 0:
        return dk, dw, None if part_top is None else part_top.sum()
    lanes, sizes = sizes_of(d, h, d_k)
    part_x = torch.empty((work.n_split, d), dtype=torch.float32, device=x.device)
    _attention_diffusion_bwd_dk_kernel[(programs,)](
        dx,
        dk,
        dw,
        dtop_ptr=part_top,
        part_x_ptr=part_x,
        part_k_ptr=part_k,
        df_ptr=df,
        x_ptr=x,
        q_ptr=q,
        k_ptr=k,
        norm_ptr=norm,
        alpha_ptr=alpha,
        add=dense(add),
        weighting=weighting,
        col_ptr=csr.col,
        slot_ptr=weighting.slot(csr),
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_dx_n=0 if dx is None else dx.stride(0),
        stride_df_n=df.stride(0),
        stride_x_n=x.stride(0),
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=weighting.scale / h,
        d=d,
        H=h,
        d_k=d_k,
        HAS_DX=dx is not None,
        HAS_DK=dk is not None,
        HAS_DW=dw is not None,
        IS_SCALED=dx is not None and is_scaled,
        **sizes,
        **edges(sizes, lanes, _VALUES, scalars=sizes["BLOCK_H"]),
    )
    if dx is not None:
        join_diffusion(
            dx, part_x, df, alpha=alpha, beta=None, x0=None, add=add, csr=csr, is_scaled=is_scaled
        )
    if dk is not None and part_k is not None:
        join_dk(dk, part_k, csr=csr)
    return dk, dw, None if part_top is None else part_top.sum() / -h
