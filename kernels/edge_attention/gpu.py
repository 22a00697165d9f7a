"""edge_attention: a[e,h] = exp(s[e,h] − lse[i,h]), s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k
    or whatever else a `Weighting` says (`_triton_weighting.py`).

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of k a turn,
          in two sweeps: lse by online softmax, then the weights. A hub's lse needs all its pieces:
          they are swept first by a kernel of their own.
Bytes:    4(N+1) + 4E + b(EH + 2N·d_att) + 4NH, b bytes per element, if each k row is read once;
          4(N+1) + 4E + b(EH + (N + E)·d_att) + 4NH if no k row is reused between receivers (the
          second sweep finds a row's k in cache); the list of pieces adds 12N.
Backward: ds = p (da − Delta[i]), Delta[i] = Σ_{e in row i} p · da, per head. A row pass over the
          CSR of A gives dq and Delta, a column pass over that of Aᵀ dk. Both compute p again from
          q, k and lse, so nothing of size E is saved.
Senders:  where they normalise, a sweep over the CSR of Aᵀ writes lse of every sender, and an edge
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

from grand_fast.kernels._csr import Csr
from grand_fast.kernels._triton import launcher
from grand_fast.kernels._triton_edge_scores import row_lse, store_lse, sweep_lse
from grand_fast.kernels._triton_lse import SWEEP_VALUES, write_lse
from grand_fast.kernels._triton_sizes import score_sizes
from grand_fast.kernels._triton_sums import head_dot, scaled
from grand_fast.kernels._triton_tiles import (
    edge_offsets,
    gather_heads,
    gather_per_head,
    heads_of,
    load_heads,
    load_per_head,
    load_piece,
)
from grand_fast.kernels._triton_weighting import (
    load_edge_weight,
    load_slots,
    load_top,
    scores,
    scoring,
    sum_over_heads,
    weight,
)
from grand_fast.kernels._weighting import AttentionGradients, Weighting
from grand_fast.kernels.edge_attention._triton_column_pass import bwd_dk
from grand_fast.kernels.edge_attention._triton_row_pass import bwd_dq


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_fwd_kernel(
    a_ptr,
    lse_ptr,
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
    scale,
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
    q = scaled(q, scale)
    top = load_top(weighting)
    if not IS_BY_SENDER:
        if pid_p < n_split:
            lse = load_per_head(lse_ptr + row * H, H, BLOCK_H, N_H, float("inf"))
        else:
            m, l = sweep_lse(  # noqa: E741
                q, k_ptr, weighting, top, col_ptr, None, beg, count, stride_k_n, H, d_k, BLOCK_H,
                BLOCK_K, BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G,
            )  # fmt: skip
            lse = row_lse(m, l, H, BLOCK_H, N_H)
            store_lse(lse_ptr + row * H, lse, H, BLOCK_H, N_H)
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
            lse_row = lse_ptr + j[:, :, None].to(tl.int64) * H
            lse = gather_per_head(lse_row, 0, mask_e, float("inf"), H, BLOCK_H, N_H)
        if IS_MEAN:
            # [BLOCK_E, BLOCK_G, BLOCK_H] each
            a = sum_over_heads(weight(s[0], lse[0], weighting, top), weighting)
            for g in tl.static_range(1, N_H):
                a += sum_over_heads(weight(s[g], lse[g], weighting, top), weighting)
            a = (a / H).to(a_ptr.dtype.element_ty)
            tl.store(a_ptr + beg + (e + offs_e), a, mask=mask_e)
        else:
            at = a_ptr + beg * H + (e + offs_e)[:, :, None] * H
            for g in tl.static_range(N_H):
                p = weight(s[g], lse[g], weighting, top).to(a_ptr.dtype.element_ty)
                mask = mask_e[:, :, None] & (heads_of(g, BLOCK_H) < H)
                tl.store(at + heads_of(g, BLOCK_H), p, mask=mask)


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
    of = scoring(
        replace(weighting, normalizer="softmax"), q.shape[2], edge_weight=edge_weight, top=None
    )
    top = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    write_lse(top, q, k, scoring=of, csr=csr, whole_rows=True, is_top=True)
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
) -> tuple[Float[Tensor, "E H"] | Float[Tensor, " E"], Float[Tensor, "N H"]]:
    """Edge weights `a` in slot order (their mean over heads if `mean_heads`), and `lse`."""
    by_sender = weighting is not None and weighting.normalize == "sender"
    work, (n, h, d_k) = csr.work, q.shape
    of = scoring(weighting, d_k, edge_weight=edge_weight, top=top)
    e = csr.col.numel()
    a = torch.empty((e,) if mean_heads else (e, h), dtype=q.dtype, device=q.device)
    lse = torch.empty((n, h), dtype=torch.float32, device=q.device)
    if n == 0:
        return a, lse
    if by_sender:
        assert csr_t is not None
        write_lse(lse, k, q, scoring=of, csr=csr_t, whole_rows=True)
    else:
        write_lse(lse, q, k, scoring=of, csr=csr, whole_rows=False)
    sizes, blocks = score_sizes(h, d_k, q.dtype, SWEEP_VALUES, per_head=by_sender)
    _edge_attention_fwd_kernel[(work.piece_row.numel(),)](
        a,
        lse,
        q,
        k_ptr=k,
        weighting=of.weighting,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=of.dot_scale,
        H=h,
        d_k=d_k,
        IS_MEAN=mean_heads,
        IS_BY_SENDER=by_sender,
        **sizes,
        **blocks,
    )
    return a, lse


@launcher
def edge_attention_bwd(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    lse: Float[Tensor, "N H"],
    csr: Csr,
    csr_t: Csr,
    needs_dedge_weight: bool = False,
) -> AttentionGradients:
    """Gradients by `q`, `k`, weights and top; `da` of shape [E] is that of the mean over heads."""
    of = scoring(weighting, q.shape[2], edge_weight=edge_weight, top=top)
    if weighting is None or weighting.normalize == "receiver":
        dq, lse_delta = bwd_dq(da, q, k, lse=lse, scoring=of, csr=csr)
        dk, dw, dtop = bwd_dk(
            da, q, k, lse_delta=lse_delta, scoring=of, csr=csr_t,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
    else:  # as seen from the senders, whose rows are those of Aᵀ
        dk, lse_delta = bwd_dq(da, k, q, lse=lse, scoring=of, csr=csr_t)
        dq, dw, dtop = bwd_dk(
            da, k, q, lse_delta=lse_delta, scoring=of, csr=csr,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
    return AttentionGradients(dq=dq, dk=dk, dedge_weight=dw, dtop=dtop)
