"""edge_attention: a[e,h] = exp(s[e,h] − lse[i,h]), s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of k a turn,
          in two sweeps: lse by online softmax, then the weights. A hub's lse needs all its pieces:
          they are swept first by a kernel of their own.
Bytes:    4(N+1) + 4E + b(EH + 2N·d_att) + 4NH, b bytes per element, if each k row is read once;
          4(N+1) + 4E + b(EH + (N + E)·d_att) + 4NH if no k row is reused between receivers (the
          second sweep finds a row's k in cache); the list of pieces adds 12N.
Backward: ds = p (da − Delta[i]), Delta[i] = Σ_{e in row i} p · da, per head. A row pass over the
          CSR of A gives dq and Delta, a column pass over that of Aᵀ dk. Both compute p again from
          q, k and lse, so nothing of size E is saved.
Order:    one writer per output element; edges summed in CSR order, pieces of a hub in theirs:
          bitwise repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Csr
from grand_fast.kernels._triton import (
    by_head,
    edge_offsets,
    gather,
    head_columns,
    head_widths,
    join,
    launcher,
    load_piece,
    log_sum,
    store_dq,
    sweep_lse,
    tile,
)

# Elements of a gathered tile per warp: bytes in flight against registers.
_TILE = {
    "fwd": 1024,  # k is used at once; only m and l stay
    "bwd_dq": 512,  # two accumulators as wide as k, and products with it
    "bwd_dk": 512,  # one accumulator, but lse, Delta and da are gathered too
}


@triton.jit
def _edge_attention_fwd_lse_kernel(
    part_m_ptr,
    part_l_ptr,
    q_ptr,
    k_ptr,
    col_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, end = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    q = tl.load(q_ptr + row * stride_q_n + offs_a, mask=mask_a, other=0.0).to(tl.float32) * scale
    m, l = sweep_lse(  # noqa: E741
        q, k_ptr, col_ptr, beg, end, offs_a, mask_a, stride_k_n, BLOCK_H, BLOCK_E, BLOCK_G
    )
    tl.store(part_m_ptr + pid_p * H + offs_h, m, mask=offs_h < H)
    tl.store(part_l_ptr + pid_p * H + offs_h, l, mask=offs_h < H)


@triton.jit
def _edge_attention_fwd_lse_join_kernel(
    lse_ptr,
    part_m_ptr,
    part_l_ptr,
    split_row_ptr,
    split_ptr_ptr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    m = tl.load(part_m_ptr + first * H + offs_h, mask=mask_h, other=0.0)
    l = tl.load(part_l_ptr + first * H + offs_h, mask=mask_h, other=1.0)  # noqa: E741
    for p in range(first + 1, last):
        m_p = tl.load(part_m_ptr + p * H + offs_h, mask=mask_h, other=0.0)
        l_p = tl.load(part_l_ptr + p * H + offs_h, mask=mask_h, other=0.0)
        top = tl.maximum(m, m_p)
        l = l * tl.exp(m - top) + l_p * tl.exp(m_p - top)  # noqa: E741
        m = top
    tl.store(lse_ptr + row * H + offs_h, log_sum(m, l), mask=mask_h)


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_fwd_kernel(
    a_ptr,
    lse_ptr,
    q_ptr,
    k_ptr,
    col_ptr,
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
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, end = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    q = tl.load(q_ptr + row * stride_q_n + offs_a, mask=mask_a, other=0.0).to(tl.float32) * scale
    if pid_p < n_split:
        lse = tl.load(lse_ptr + row * H + offs_h, mask=mask_h, other=float("inf"))
    else:
        m, l = sweep_lse(  # noqa: E741
            q, k_ptr, col_ptr, beg, end, offs_a, mask_a, stride_k_n, BLOCK_H, BLOCK_E, BLOCK_G
        )
        lse = tl.where(mask_h, log_sum(m, l), float("inf"))  # a padded head gets no weight
        tl.store(lse_ptr + row * H + offs_h, lse, mask=mask_h)
    for e in range(beg, end, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < end
        j = tl.load(col_ptr + e + offs_e, mask=mask_e, other=0).to(tl.int64)
        k = gather(k_ptr, j, mask_e, offs_a, mask_a, stride_k_n)
        p = tl.exp(tl.sum(by_head(k * q, BLOCK_H), 3) - lse)  # [BLOCK_E, BLOCK_G, BLOCK_H]
        if IS_MEAN:
            a = tl.sum(p, 2) / H
            tl.store(a_ptr + e + offs_e, a.to(a_ptr.dtype.element_ty), mask=mask_e)
        else:
            at = a_ptr + (e + offs_e)[:, :, None] * H + offs_h
            tl.store(at, p.to(a_ptr.dtype.element_ty), mask=mask_e[:, :, None] & mask_h)


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_bwd_dq_kernel(
    dq_ptr,
    delta_ptr,
    part_ptr,
    da_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    col_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    score_scale,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    IS_MEAN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, end = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    q = tl.load(q_ptr + row * stride_q_n + offs_a, mask=mask_a, other=0.0).to(tl.float32)
    q *= score_scale
    lse = tl.load(lse_ptr + row * H + offs_h, mask=mask_h, other=float("inf"))
    p_groups = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    pt_groups = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    pk_groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    ptk_groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    for e in range(beg, end, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < end
        j = tl.load(col_ptr + e + offs_e, mask=mask_e, other=0).to(tl.int64)
        k = by_head(gather(k_ptr, j, mask_e, offs_a, mask_a, stride_k_n), BLOCK_H)
        p = tl.exp(tl.sum(k * tl.reshape(q, [BLOCK_H, BLOCK_K]), 3) - lse)
        p = tl.where(mask_e[:, :, None], p, 0.0)
        t = load_da(da_ptr, e + offs_e, mask_e, offs_h, H, IS_MEAN)
        p_groups += tl.sum(p, 0)
        pt_groups += tl.sum(p * t, 0)
        pk_groups += tl.sum(p[:, :, :, None] * k, 0)
        ptk_groups += tl.sum((p * t)[:, :, :, None] * k, 0)
    sum_p = tl.sum(p_groups, 0)
    sum_pt = tl.sum(pt_groups, 0)
    sum_pk = tl.reshape(tl.sum(pk_groups, 0), [BLOCK_H * BLOCK_K])
    sum_ptk = tl.reshape(tl.sum(ptk_groups, 0), [BLOCK_H * BLOCK_K])
    if pid_p < n_split:
        store_dq_part(part_ptr, sum_p, sum_pt, sum_pk, sum_ptk, 0.0, pid_p, BLOCK_H, BLOCK_K)
    else:
        store_dq(
            dq_ptr, delta_ptr, sum_p, sum_pt, sum_pk, sum_ptk, 0.0, row, scale, H, d_k,
            BLOCK_H, BLOCK_K,
        )  # fmt: skip


@triton.jit
def store_dq_part(
    part_ptr,
    sum_p,
    sum_pt,
    sum_pk,
    sum_ptk,
    t0,
    pid_p,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums of one piece, a row of `part`: Σ p k | Σ p t k | Σ p | Σ p t | t0."""
    offs_a = tl.arange(0, BLOCK_H * BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H) + 2 * BLOCK_H * BLOCK_K
    at = part_ptr + pid_p * (BLOCK_H * (2 * BLOCK_K + 3))
    tl.store(at + offs_a, sum_pk)
    tl.store(at + offs_a + BLOCK_H * BLOCK_K, sum_ptk)
    tl.store(at + offs_h, sum_p)
    tl.store(at + offs_h + BLOCK_H, sum_pt)
    tl.store(at + offs_h + 2 * BLOCK_H, tl.zeros([BLOCK_H], tl.float32) + t0)


@triton.jit
def _edge_attention_bwd_dq_join_kernel(
    dq_ptr,
    delta_ptr,
    part_ptr,
    split_row_ptr,
    split_ptr_ptr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    width: tl.constexpr = BLOCK_H * (2 * BLOCK_K + 3)
    offs_a = tl.arange(0, BLOCK_H * BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H) + 2 * BLOCK_H * BLOCK_K
    sum_pk = join(part_ptr, first, last, offs_a, offs_a < width, width)
    sum_ptk = join(part_ptr + BLOCK_H * BLOCK_K, first, last, offs_a, offs_a < width, width)
    sum_p = join(part_ptr, first, last, offs_h, offs_h < width, width)
    sum_pt = join(part_ptr + BLOCK_H, first, last, offs_h, offs_h < width, width)
    t0 = tl.load(part_ptr + first * width + 2 * BLOCK_H + offs_h)  # alike in all pieces of a row
    store_dq(
        dq_ptr, delta_ptr, sum_p, sum_pt, sum_pk, sum_ptk, t0, row, scale, H, d_k,
        BLOCK_H, BLOCK_K,
    )  # fmt: skip


@triton.jit
def load_da(da_ptr, slot, mask_e, offs_h, H: tl.constexpr, IS_MEAN: tl.constexpr):
    """Gradients of the weights of [BLOCK_E, BLOCK_G] slots, one column per head or one for all."""
    if IS_MEAN:
        t = tl.load(da_ptr + slot[:, :, None], mask=mask_e[:, :, None], other=0.0)
    else:
        at = da_ptr + slot[:, :, None] * H + offs_h
        t = tl.load(at, mask=mask_e[:, :, None] & (offs_h < H), other=0.0)
    return t.to(tl.float32)


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_bwd_dk_kernel(
    dk_ptr,
    part_ptr,
    da_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    delta_ptr,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    score_scale,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    IS_MEAN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, end = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    k = tl.load(k_ptr + row * stride_k_n + offs_a, mask=mask_a, other=0.0).to(tl.float32)
    k = tl.reshape(k * score_scale, [BLOCK_H, BLOCK_K])
    groups = tl.zeros([BLOCK_G, BLOCK_H, BLOCK_K], tl.float32)
    for e in range(beg, end, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < end
        mask_eh = mask_e[:, :, None] & mask_h
        i = tl.load(col_ptr + e + offs_e, mask=mask_e, other=0).to(tl.int64)
        slot = tl.load(slot_ptr + e + offs_e, mask=mask_e, other=0).to(tl.int64)
        q = by_head(gather(q_ptr, i, mask_e, offs_a, mask_a, stride_q_n), BLOCK_H)
        at = i[:, :, None] * H + offs_h
        lse = tl.load(lse_ptr + at, mask=mask_eh, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=mask_eh, other=0.0)
        t = load_da(da_ptr, slot, mask_e, offs_h, H, IS_MEAN)
        ds = tl.exp(tl.sum(q * k, 3) - lse) * (t - delta)
        groups += tl.sum(ds[:, :, :, None] * q, 0)
    dk = scale * tl.reshape(tl.sum(groups, 0), [BLOCK_H * BLOCK_K])
    if pid_p < n_split:
        tl.store(part_ptr + pid_p * (H * d_k) + offs_a, dk, mask=mask_a)
    else:
        tl.store(dk_ptr + row * (H * d_k) + offs_a, dk.to(dk_ptr.dtype.element_ty), mask=mask_a)


@triton.jit
def _edge_attention_bwd_dk_join_kernel(
    dk_ptr,
    part_ptr,
    split_row_ptr,
    split_ptr_ptr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    dk = join(part_ptr, first, last, offs_a, mask_a, H * d_k)
    tl.store(dk_ptr + row * (H * d_k) + offs_a, dk.to(dk_ptr.dtype.element_ty), mask=mask_a)


def split_lse(
    lse: Float[Tensor, "N H"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    csr: Csr,
) -> None:
    """Write the rows of `lse` that have several pieces."""
    work, (_, h, d_k) = csr.work, q.shape
    if work.n_split == 0:
        return
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    part_m = torch.empty((work.n_split, h), dtype=torch.float32, device=q.device)
    part_l = torch.empty((work.n_split, h), dtype=torch.float32, device=q.device)
    _edge_attention_fwd_lse_kernel[(work.n_split,)](
        part_m,
        part_l,
        q,
        k_ptr=k,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=1 / math.sqrt(d_k),
        H=h,
        d_k=d_k,
        **widths,
        **tile(columns, columns, q.dtype, _TILE["fwd"]),
    )
    _edge_attention_fwd_lse_join_kernel[(work.split_row.numel(),)](
        lse,
        part_m,
        part_l,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        BLOCK_H=widths["BLOCK_H"],
        num_warps=1,
    )


def join_dq(
    dq: Float[Tensor, "N H d_k"],
    delta: Float[Tensor, "N H"],
    part: Float[Tensor, "P W"],
    *,
    scale: float,
    csr: Csr,
) -> None:
    """Write the rows of `dq` and `delta` that have several pieces, from their sums `part`."""
    work, (_, h, d_k) = csr.work, dq.shape
    if work.n_split == 0:
        return
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _edge_attention_bwd_dq_join_kernel[(work.split_row.numel(),)](
        dq,
        delta,
        part,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        scale=scale,
        H=h,
        d_k=d_k,
        **widths,
        num_warps=tile(columns, columns, torch.float32, _TILE["fwd"])["num_warps"],
    )


def join_dk(dk: Float[Tensor, "N H d_k"], part: Float[Tensor, "P d_att"], *, csr: Csr) -> None:
    """Write the rows of `dk` that have several pieces, from their sums `part`."""
    work, (_, h, d_k) = csr.work, dk.shape
    if work.n_split == 0:
        return
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _edge_attention_bwd_dk_join_kernel[(work.split_row.numel(),)](
        dk,
        part,
        work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        d_k=d_k,
        **widths,
        num_warps=tile(columns, columns, torch.float32, _TILE["fwd"])["num_warps"],
    )


def dq_part(q: Float[Tensor, "N H d_k"], csr: Csr) -> Float[Tensor, "P W"]:
    """Memory for the sums of the pieces of split rows, as `store_dq_part` lays them out."""
    widths = head_widths(q.shape[1], q.shape[2])
    columns = widths["BLOCK_H"] * (2 * widths["BLOCK_K"] + 3)
    return torch.empty((csr.work.n_split, columns), dtype=torch.float32, device=q.device)


@launcher
def edge_attention_fwd(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    mean_heads: bool,
    csr: Csr,
) -> tuple[Float[Tensor, "E H"] | Float[Tensor, " E"], Float[Tensor, "N H"]]:
    """Edge weights `a` in slot order (their mean over heads if `mean_heads`), and `lse`."""
    work, (n, h, d_k) = csr.work, q.shape
    e = csr.col.numel()
    a = torch.empty((e,) if mean_heads else (e, h), dtype=q.dtype, device=q.device)
    lse = torch.empty((n, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return a, lse
    split_lse(lse, q, k, csr=csr)
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    _edge_attention_fwd_kernel[(work.piece_row.numel(),)](
        a,
        lse,
        q,
        k_ptr=k,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=1 / math.sqrt(d_k),
        H=h,
        d_k=d_k,
        IS_MEAN=mean_heads,
        **widths,
        **tile(columns, columns, q.dtype, _TILE["fwd"]),
    )
    return a, lse


@launcher
def edge_attention_bwd(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    lse: Float[Tensor, "N H"],
    csr: Csr,
    csr_t: Csr,
) -> tuple[Float[Tensor, "N H d_k"], Float[Tensor, "N H d_k"]]:
    """Gradients by `q` and `k`; `da` of shape [E] is that of the mean over heads."""
    n, h, d_k = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if n == 0:
        return dq, dk
    is_mean = da.dim() == 1
    delta = torch.empty((n, h), dtype=torch.float32, device=q.device)
    score_scale = 1 / math.sqrt(d_k)
    scale = score_scale / h if is_mean else score_scale
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    part_q = dq_part(q, csr)
    _edge_attention_bwd_dq_kernel[(csr.work.piece_row.numel(),)](
        dq,
        delta,
        part_q,
        da_ptr=da,
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        col_ptr=csr.col,
        piece_row_ptr=csr.work.piece_row,
        piece_beg_ptr=csr.work.piece_beg,
        piece_end_ptr=csr.work.piece_end,
        n_split=csr.work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        score_scale=score_scale,
        scale=scale,
        H=h,
        d_k=d_k,
        IS_MEAN=is_mean,
        **widths,
        **tile(columns, columns, q.dtype, _TILE["bwd_dq"]),
    )
    join_dq(dq, delta, part_q, scale=scale, csr=csr)
    part_k = torch.empty((csr_t.work.n_split, h * d_k), dtype=torch.float32, device=q.device)
    _edge_attention_bwd_dk_kernel[(csr_t.work.piece_row.numel(),)](
        dk,
        part_k,
        da,
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        delta_ptr=delta,
        col_ptr=csr_t.col,
        slot_ptr=csr_t.slot,
        piece_row_ptr=csr_t.work.piece_row,
        piece_beg_ptr=csr_t.work.piece_beg,
        piece_end_ptr=csr_t.work.piece_end,
        n_split=csr_t.work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        score_scale=score_scale,
        scale=scale,
        H=h,
        d_k=d_k,
        IS_MEAN=is_mean,
        **widths,
        **tile(columns, columns, q.dtype, _TILE["bwd_dk"], scalars=widths["BLOCK_H"]),
    )
    join_dk(dk, part_k, csr=csr_t)
    return dq, dk
