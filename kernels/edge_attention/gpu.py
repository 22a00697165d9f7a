"""edge_attention: a[e,:] = softmax over row i of s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k
    or whatever else a `Weighting` says (`gpu/attention/weighting.py`).

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of k a turn,
          in two sweeps: norm by online softmax, then the weights. A hub's needs all its pieces:
          they are swept first by a kernel of their own.
Bytes:    4(N+1) + 4E + b(EH + 2N·d_att) + 8NH, b bytes per element, if each k row is read once;
          4(N+1) + 4E + b(EH + (N + E)·d_att) + 8NH if no k row is reused between receivers (the
          second sweep finds a row's k in cache); the list of pieces adds 12N.
Backward: ds = p (da − Delta[i]), Delta[i] = Σ_{e in row i} p · da, per head. A row pass over the
          CSR of A gives dq and Delta, a column pass over that of Aᵀ dk. Both compute p again from
          q, k and norm, of which the row pass takes the shift alone and hands on its own sum beside
          Delta (12H an edge): nothing of size E is saved.
Senders:  where they normalise, a sweep over the CSR of Aᵀ writes norm of every sender, and an edge
          gathers it beside k. The passes of the backward change places.
Order:    one writer per output element; edges summed in CSR order, pieces of a hub in theirs:
          bitwise repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

from dataclasses import replace

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.edge_column_pass import bwd_dk
from grand_fast.kernels.gpu.attention.edge_row_pass import bwd_dq
from grand_fast.kernels.gpu.attention.normalizer import SWEEP_VALUES, write_norm
from grand_fast.kernels.gpu.attention.scores import (
    gather_norm,
    load_norm,
    norm_of,
    store_norm,
    sweep_scores,
)
from grand_fast.kernels.gpu.attention.weighting import (
    kernel_weighting,
    load_edge_weight,
    load_slots,
    load_top,
    scores,
    weight,
)
from grand_fast.kernels.gpu.pieces import launcher
from grand_fast.kernels.gpu.sizes import score_sizes
from grand_fast.kernels.gpu.sums import head_dot
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_heads,
    heads_of,
    load_heads,
    load_piece,
)
from grand_fast.kernels.weighting import AttentionGradients, Weighting


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_fwd_kernel(
    a_ptr,
    norm_ptr,
    q_ptr,
    k_ptr,
    weighting,
    col_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    IS_MEAN: tl.constexpr,
    IS_BY_SENDER: tl.constexpr,
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
    if not IS_BY_SENDER:
        if pid_p < n_split:
            shift, inverse = load_norm(norm_ptr + row * (2 * H), weighting, H, BLOCK_H, N_H)
        else:
            m, l = sweep_scores(  # noqa: E741
                q, k_ptr, weighting, top, col_ptr, None, beg, count, stride_k_n, H, d_k, BLOCK_H,
                BLOCK_K, BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G,
            )  # fmt: skip
            shift, inverse = norm_of(m, l, H, BLOCK_H, N_H)
            store_norm(norm_ptr + row * (2 * H), shift, inverse, weighting, H, BLOCK_H, N_H)
    j_next = tl.load(col_ptr + beg + offs_e, mask=offs_e < count, other=0)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = j_next
        behind = e + (BLOCK_E * BLOCK_G + offs_e)
        j_next = tl.load(col_ptr + beg + behind, mask=behind < count, other=0)
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        slot = load_slots(None, beg, e + offs_e, mask_e)
        w = load_edge_weight(weighting, slot, mask_e)
        s = scores(head_dot(k, q, BLOCK_H, N_H, VEC_A), w, weighting)
        if IS_BY_SENDER:
            shift, inverse = gather_norm(
                norm_ptr, j, mask_e, weighting, 2 * H, False, H, BLOCK_H, N_H
            )
        if IS_MEAN:
            # [BLOCK_E, BLOCK_G, BLOCK_H] each
            a = tl.sum(weight(s[0], shift[0], inverse[0], weighting, top), 2)
            for g in tl.static_range(1, N_H):
                a += tl.sum(weight(s[g], shift[g], inverse[g], weighting, top), 2)
            a = (a / H).to(a_ptr.dtype.element_ty)
            tl.store(a_ptr + beg + (e + offs_e), a, mask=mask_e)
        else:
            at = a_ptr + beg * H + (e + offs_e)[:, :, None] * H
            for g in tl.static_range(N_H):
                a = weight(s[g], shift[g], inverse[g], weighting, top)
                mask = mask_e[:, :, None] & (heads_of(g, BLOCK_H) < H)
                tl.store(at + heads_of(g, BLOCK_H), a.to(a_ptr.dtype.element_ty), mask=mask)


@launcher
def edge_attention_top(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting,
    edge_weight: Float[Tensor, " E"] | None,
    csr: Csr,
) -> Float[Tensor, "N H"]:
    """The largest score of each receiver and head; −inf where there is no edge."""
    of = kernel_weighting(
        replace(weighting, normalizer="softmax"), q.shape[2], edge_weight=edge_weight, top=None
    )
    top = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    write_norm(top, q, k, weighting=of, csr=csr, whole_rows=True, is_top=True)
    return top


@launcher
def edge_attention_fwd(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    mean_heads: bool,
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "E H"] | Float[Tensor, " E"], Float[Tensor, "N 2 H"]]:
    """Edge weights `a` in slot order (their mean over heads if `mean_heads`), and `norm`."""
    by_sender = weighting is not None and weighting.normalize == "sender"
    work, (n, h, d_k) = csr.work, q.shape
    of = kernel_weighting(weighting, d_k, edge_weight=edge_weight, top=top)
    e = csr.col.numel()
    a = torch.empty((e,) if mean_heads else (e, h), dtype=q.dtype, device=q.device)
    norm = torch.empty((n, 2, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return a, norm
    if by_sender:
        assert csr_t is not None
        write_norm(norm, k, q, weighting=of, csr=csr_t, whole_rows=True)
    else:
        write_norm(norm, q, k, weighting=of, csr=csr, whole_rows=False)
    sizes, blocks = score_sizes(h, d_k, q.dtype, SWEEP_VALUES, per_head=by_sender)
    _edge_attention_fwd_kernel[(work.piece_row.numel(),)](
        a,
        norm,
        q,
        k_ptr=k,
        weighting=of,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        H=h,
        d_k=d_k,
        IS_MEAN=mean_heads,
        IS_BY_SENDER=by_sender,
        **sizes,
        **blocks,
    )
    return a, norm


@launcher
def edge_attention_bwd(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    norm: Float[Tensor, "N 2 H"],
    csr: Csr,
    csr_t: Csr,
    needs_dedge_weight: bool = False,
) -> AttentionGradients:
    """Gradients by `q`, `k`, weights and top; `da` of shape [E] is that of the mean over heads."""
    of = kernel_weighting(weighting, q.shape[2], edge_weight=edge_weight, top=top)
    if weighting is None or weighting.normalize == "receiver":
        dq, norm_delta = bwd_dq(da, q, k, norm=norm, weighting=of, csr=csr)
        dk, dw, dtop = bwd_dk(
            da, q, k, norm_delta=norm_delta, weighting=of, csr=csr_t,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
    else:  # as seen from the senders, whose rows are those of Aᵀ
        dk, norm_delta = bwd_dq(da, k, q, norm=norm, weighting=of, csr=csr_t)
        dq, dw, dtop = bwd_dk(
            da, k, q, norm_delta=norm_delta, weighting=of, csr=csr,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
    return AttentionGradients(dq=dq, dk=dk, dedge_weight=dw, dtop=dtop)
