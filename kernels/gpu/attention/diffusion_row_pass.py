"""The row pass of the backward of `attention_diffusion`: dq and Delta; `diffusion_backward.py`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.gpu.attention.backward import (
    add_dq_sums,
    dq_part,
    join_dq,
    join_dq_sums,
    no_dq_sums,
    store_dq,
    store_dq_part,
)
from grand_fast.kernels.gpu.attention.diffusion_backward import add_values, sizes_of, store_dx
from grand_fast.kernels.gpu.attention.scores import load_norm
from grand_fast.kernels.gpu.attention.weighting import (
    KernelWeighting,
    load_edge_weight,
    load_slots,
    load_top,
    scores,
    unnormalised,
    weight,
)
from grand_fast.kernels.gpu.diffusion import dense, join_diffusion
from grand_fast.kernels.gpu.sizes import edges
from grand_fast.kernels.gpu.sums import (
    edge_dot,
    head_dot,
    join_lanes,
    products,
    row_dot,
    scaled,
    zeros,
)
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_heads,
    gather_values,
    load_heads,
    load_piece,
    load_values,
)

# Of the gathered tiles, per lane; more edges a turn leave more empty slots behind short rows.
_VALUES = 16


@triton.jit(do_not_specialize=["n_split"])
def _attention_diffusion_bwd_dq_kernel(
    dq_ptr,
    norm_delta_ptr,
    dx_ptr,
    part_ptr,
    part_x_ptr,
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
    q = load_heads(q_ptr + row * stride_q_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
    top = load_top(weighting)
    shift, inverse = load_norm(norm_ptr + row * (2 * H), weighting, H, BLOCK_H, N_H)
    g = load_values(df_ptr + row * stride_df_n, d, BLOCK_D, VEC_D, N_D)
    g = products(g, load_values(alpha_ptr, d, BLOCK_D, VEC_D, N_D))
    # After some diffusion neighbours are alike: t − t0 is small, and keeps its digits in the sums.
    t0 = row_dot(g, load_values(x_ptr + row * stride_x_n, d, BLOCK_D, VEC_D, N_D))
    sums = no_dq_sums(BLOCK_G, BLOCK_H, BLOCK_A, N_A, N_H)
    x_groups = ()
    if HAS_DX:
        x_groups = zeros(N_D, BLOCK_G, BLOCK_D)
    j_next = tl.load(col_ptr + beg + offs_e, mask=offs_e < count, other=0)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = j_next
        behind = e + (BLOCK_E * BLOCK_G + offs_e)
        j_next = tl.load(col_ptr + beg + behind, mask=behind < count, other=0)
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        x = gather_values(x_ptr, j, mask_e, stride_x_n, d, BLOCK_D, VEC_D, N_D)
        slot = load_slots(slot_ptr, beg, e + offs_e, mask_e)
        w = load_edge_weight(weighting, slot, mask_e)
        u = head_dot(k, q, BLOCK_H, N_H, VEC_A)
        s = scores(u, w, weighting)
        t = (edge_dot(x, g, BLOCK_H, VEC_D) - t0)[:, :, None]
        ts = ()
        ps = ()
        for h in tl.static_range(N_H):
            p = unnormalised(s[h], shift[h], weighting, top)
            ps = ps + (tl.where(mask_e[:, :, None], p, 0.0),)
            ts = ts + (t,)
        sums = add_dq_sums(sums, ps, ts, k, u, s, w, weighting, top, BLOCK_H, N_H)
        if HAS_DX:
            ws = ()
            for h in tl.static_range(N_H):
                ws = ws + (weight(s[h], shift[h], inverse[h], weighting, top),)
            x_groups = add_values(x_groups, ws, x)
    sum_p, sum_pt, sum_pk, sum_ptk = join_dq_sums(sums)
    if pid_p < n_split:
        store_dq_part(
            part_ptr + pid_p * (2 * N_A * BLOCK_A + 4 * N_H * BLOCK_H), sum_p, sum_pt, sum_pk,
            sum_ptk, t0, shift, BLOCK_H, BLOCK_A, N_A, N_H,
        )  # fmt: skip
    else:
        store_dq(
            dq_ptr + row * (H * d_k), norm_delta_ptr + row * (3 * H), sum_p, sum_pt, sum_pk,
            sum_ptk, t0, shift, scale, H, d_k, BLOCK_H, BLOCK_K, BLOCK_A, VEC_A, N_A, N_H,
        )  # fmt: skip
    if HAS_DX:
        ax = scaled(join_lanes(x_groups), 1 / H)
        store_dx(
            dx_ptr, part_x_ptr, ax, x_ptr, alpha_ptr, add, row, pid_p, n_split, stride_dx_n,
            stride_x_n, d, IS_SCALED, BLOCK_D, VEC_D, N_D,
        )  # fmt: skip


def bwd_dq(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    norm: Float[Tensor, "N 2 H"],
    weighting: KernelWeighting,
    alpha: Float[Tensor, " d"],
    csr: Csr,
    dx: Float[Tensor, "N d"] | None = None,
    add: Add = (),
    is_scaled: bool = True,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, "N 3 H"]]:
    """The row pass: dq, and what the column pass needs of a row, see `store_dq`.

    Writes `dx` where senders normalise.
    """
    work, d, (n, h, d_k) = csr.work, x.shape[1], q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    norm_delta = torch.empty((n, 3, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return dq, norm_delta
    scale = weighting.scale / h
    lanes, sizes = sizes_of(d, h, d_k)
    part = dq_part(csr, sizes)
    part_x = (
        None if dx is None else torch.empty((work.n_split, d), dtype=torch.float32, device=x.device)
    )
    _attention_diffusion_bwd_dq_kernel[(work.piece_row.numel(),)](
        dq,
        norm_delta,
        dx,
        part_ptr=part,
        part_x_ptr=part_x,
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
        scale=scale,
        d=d,
        H=h,
        d_k=d_k,
        HAS_DX=dx is not None,
        IS_SCALED=dx is not None and is_scaled,
        **sizes,
        **edges(sizes, lanes, _VALUES),
    )
    join_dq(dq, norm_delta, part, scale=scale, csr=csr, sizes=sizes)
    if dx is not None and part_x is not None:
        join_diffusion(
            dx, part_x, x, alpha=alpha, beta=None, x0=None, add=add, csr=csr, is_scaled=is_scaled
        )
    return dq, norm_delta
