"""The row pass of the backward of `edge_attention`: dq and Delta; `edge_backward.py`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.backward import (
    add_dq_sums,
    dq_part,
    join_dq,
    join_dq_sums,
    no_dq_sums,
    store_dq,
    store_dq_part,
)
from grand_fast.kernels.gpu.attention.edge_backward import VALUES, heads_of_mean, load_da
from grand_fast.kernels.gpu.attention.scores import load_norm
from grand_fast.kernels.gpu.attention.weighting import (
    KernelWeighting,
    load_edge_weight,
    load_slots,
    load_top,
    scores,
    unnormalised,
)
from grand_fast.kernels.gpu.sizes import score_sizes
from grand_fast.kernels.gpu.sums import head_dot
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_heads,
    load_heads,
    load_piece,
)


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_bwd_dq_kernel(
    dq_ptr,
    norm_delta_ptr,
    part_ptr,
    da_ptr,
    q_ptr,
    k_ptr,
    norm_ptr,
    weighting,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    IS_MEAN: tl.constexpr,
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
    shift, _ = load_norm(norm_ptr + row * (2 * H), weighting, H, BLOCK_H, N_H)
    sums = no_dq_sums(BLOCK_G, BLOCK_H, BLOCK_A, N_A, N_H)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        slot = load_slots(slot_ptr, beg + e, offs_e, mask_e)
        w = load_edge_weight(weighting, slot, mask_e)
        u = head_dot(k, q, BLOCK_H, N_H, VEC_A)
        s = scores(u, w, weighting)
        p = ()
        for g in tl.static_range(N_H):
            p_g = unnormalised(s[g], shift[g], weighting, top)
            p = p + (tl.where(mask_e[:, :, None], p_g, 0.0),)
        t = load_da(da_ptr, slot, mask_e, H, BLOCK_H, N_H, IS_MEAN)
        sums = add_dq_sums(sums, p, t, k, u, s, w, weighting, top, BLOCK_H, N_H)
    sum_p, sum_pt, sum_pk, sum_ptk = join_dq_sums(sums)
    if pid_p < n_split:
        store_dq_part(
            part_ptr + pid_p * (2 * N_A * BLOCK_A + 4 * N_H * BLOCK_H), sum_p, sum_pt, sum_pk,
            sum_ptk, 0.0, shift, BLOCK_H, BLOCK_A, N_A, N_H,
        )  # fmt: skip
    else:
        store_dq(
            dq_ptr + row * (H * d_k), norm_delta_ptr + row * (3 * H), sum_p, sum_pt, sum_pk,
            sum_ptk, 0.0, shift, scale, H, d_k, BLOCK_H, BLOCK_K, BLOCK_A, VEC_A, N_A, N_H,
        )  # fmt: skip


def bwd_dq(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    norm: Float[Tensor, "N 2 H"],
    weighting: KernelWeighting,
    csr: Csr,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, "N 3 H"]]:
    """The row pass: dq, and what the column pass needs of a row, see `store_dq`."""
    work, (n, h, d_k) = csr.work, q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    norm_delta = torch.empty((n, 3, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return dq, norm_delta
    scale = weighting.scale / heads_of_mean(da, h)
    sizes, blocks = score_sizes(h, d_k, q.dtype, VALUES, per_head=True)
    part = dq_part(csr, sizes)
    _edge_attention_bwd_dq_kernel[(work.piece_row.numel(),)](
        dq,
        norm_delta,
        part,
        da_ptr=da,
        q_ptr=q,
        k_ptr=k,
        norm_ptr=norm,
        weighting=weighting,
        col_ptr=csr.col,
        slot_ptr=csr.slot,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=scale,
        H=h,
        d_k=d_k,
        IS_MEAN=da.dim() == 1,
        **sizes,
        **blocks,
    )
    join_dq(dq, norm_delta, part, scale=scale, csr=csr, sizes=sizes)
    return dq, norm_delta
