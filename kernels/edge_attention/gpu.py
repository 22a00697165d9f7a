"""edge_attention: a[e,:] = softmax over row i of s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k
    or whatever else a `Weighting` says (`gpu/attention/scores.py`).

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
from grand_fast.kernels.gpu.attention.backward import attention_bwd
from grand_fast.kernels.gpu.attention.normalizer import (
    SWEEP_VALUES,
    gather_norm,
    load_norm,
    norm_of,
    store_norm,
    sweep_scores,
    write_norm,
)
from grand_fast.kernels.gpu.attention.scores import (
    edge_scores,
    kernel_weighting,
    load_top,
    weights,
)
from grand_fast.kernels.gpu.pieces import launcher
from grand_fast.kernels.gpu.sizes import score_sizes
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_rows,
    load_columns,
    load_piece,
    load_row,
    store_per_head,
    turn_columns,
)
from grand_fast.kernels.weighting import AttentionGradients, Upstream, Weighting


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_fwd_kernel(
    a_ptr,
    norm_ptr,
    q_ptr,
    k_ptr,
    weighting,
    view,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    IS_MEAN: tl.constexpr,
    IS_BY_SENDER: tl.constexpr,
    sizes: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    offs_e = edge_offsets(sizes)
    q = load_row("heads", q_ptr + row * stride_q_n, sizes)
    top = load_top(weighting)
    if not IS_BY_SENDER:
        if pid_p < n_split:
            shift, inverse = load_norm(norm_ptr, row, weighting, sizes)
        else:
            m, l = sweep_scores(  # noqa: E741
                q, k_ptr, weighting, top, view, beg, count, stride_k_n, sizes
            )
            shift, inverse = norm_of(m, l, sizes)
            store_norm(norm_ptr, row, shift, inverse, weighting, sizes)
    j_next = load_columns(view, beg, offs_e, count)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j, j_next = turn_columns(j_next, view, beg, e, offs_e, count, True, sizes)
        k = gather_rows("heads", k_ptr, j, mask_e, stride_k_n, sizes)
        slot = beg + (e + offs_e)
        s = edge_scores(k, q, slot, mask_e, weighting, sizes)[2]
        if IS_BY_SENDER:
            shift, inverse, _ = gather_norm(norm_ptr, j, mask_e, weighting, False, sizes)
        a = weights(s, shift, inverse, weighting, top)  # [BLOCK_E, BLOCK_G, BLOCK_H] each
        if IS_MEAN:
            mean = tl.sum(a[0], 2)
            for g in tl.static_range(1, sizes.N_H):
                mean += tl.sum(a[g], 2)
            mean = (mean / sizes.H).to(a_ptr.dtype.element_ty)
            tl.store(a_ptr + slot, mean, mask=mask_e)
        else:
            rows = a_ptr + beg * sizes.H + (e + offs_e)[:, :, None] * sizes.H
            store_per_head(rows, a, mask_e, sizes)


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
    _edge_attention_fwd_kernel[(work.piece_row.numel(),)](
        a, norm, q, k_ptr=k, weighting=of, view=of.view(csr), n_split=work.n_split,
        stride_q_n=q.stride(0), stride_k_n=k.stride(0), IS_MEAN=mean_heads, IS_BY_SENDER=by_sender,
        **score_sizes(h, d_k, q.dtype, SWEEP_VALUES, per_head=by_sender),
    )  # fmt: skip
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
    return attention_bwd(
        q, k, Upstream(da=da), weighting=of, norm=norm, csr=csr, csr_t=csr_t,
        by_sender=weighting is not None and weighting.normalize == "sender",
        needs_dedge_weight=needs_dedge_weight,
    )  # fmt: skip
