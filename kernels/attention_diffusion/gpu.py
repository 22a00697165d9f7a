"""attention_diffusion: f[i,:] = alpha · (Σ_{e in row i} w[e] · x[col[e],:] − x[i,:])
                                + beta · x0[i,:],
    w[e] = mean_h exp(s[e,h] − lse[i,h]), s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k
    or whatever else a `Weighting` says (`_triton_weighting.py`).

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of k and x a
          turn. In one sweep by online softmax where an accumulator for each head fits in the
          registers. Else in two: lse, then w and the sum; with lse known one accumulator serves
          all heads, so H does not cost registers. A hub's lse needs all its pieces: they are swept
          first by a kernel of their own. Where k is x itself, as one head, a row is gathered once
          for both: the projection of the keys is then absorbed into q.
Bytes:    4(N+1) + 4E + b·2N(d + d_att) + 4NH, b bytes per element, if each row is read once;
          4(N+1) + 4E + b(2Nd + Nd_att + E(d + d_att)) + 4NH if no row is reused between receivers
          (a second sweep finds a row's k in cache), counting x[i] among the latter's rows of x;
          b·Nd more with a source; the list of pieces adds 12N.
Backward: per head ds = p (t − Delta[i]) / H, t = <alpha · df[i], x[col[e]]>,
          Delta[i] = Σ_{e in row i} p · t. A row pass over the CSR of A gives dq and Delta; a column
          pass over that of Aᵀ gives dk and dx = alpha · (Σ w · df − df); it gathers lse and Delta,
          laid side by side. Both compute p again from q, k and lse: nothing of size E is saved.
          The head mean hides Delta: <df, f> would not give it.
          dalpha[d] = Σ_j x_j · (Aᵀ df − df)_j, by a pass over N that also scales dx; the bracket is
          stored in float32 in between.
Senders:  where they normalise, a sweep over the CSR of Aᵀ writes lse of every sender, and an edge
          gathers it beside k and x (4H·E more at most). The passes of the backward change places:
          that over Aᵀ gives dk, Delta and dx, that over A dq.
Weights:  an edge's is read at its slot of A in every sweep (4E each, and the slots 4E over Aᵀ); its
          gradient is written by the pass that gathers Delta.
Order:    one writer per output element; edges summed in CSR order, pieces of a hub in theirs:
          bitwise repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Add, Csr
from grand_fast.kernels._triton import launcher
from grand_fast.kernels._triton_diffusion import (
    dense,
    finish_field_gradient,
    join_diffusion,
    store_diffusion,
    store_values,
)
from grand_fast.kernels._triton_edge_scores import row_lse, store_lse, sweep_lse, write_lse
from grand_fast.kernels._triton_tiles import (
    edges,
    head_lanes,
    head_sizes,
    load_columns,
    load_heads,
    load_per_head,
    load_piece,
    scaled,
    value_lanes,
    value_sizes,
    vector,
)
from grand_fast.kernels._triton_weighting import Scoring, load_top, scoring
from grand_fast.kernels._weighting import AttentionGradients, Weighting
from grand_fast.kernels.attention_diffusion._triton_backward import LANE_COLUMNS
from grand_fast.kernels.attention_diffusion._triton_column_pass import bwd_dk
from grand_fast.kernels.attention_diffusion._triton_row_pass import bwd_dq
from grand_fast.kernels.attention_diffusion._triton_weighted_sum import sweep_once, weighted_sum

_VALUES = 32  # of the gathered tiles, per lane
# One sweep has an accumulator per head, of so many elements a lane together; with more heads a
# second gather of k costs less than the registers.
_ACCUMULATORS = 40
# NVIDIA's compiler starts the exchanges of many heads early, each in registers of its own: 118 of
# them, or 96 if told so, which lets 20 warps be resident instead of 16.
_MANY_HEADS, _REGISTERS = 8, 96


@triton.jit(do_not_specialize=["n_split"])
def _attention_diffusion_fwd_kernel(
    f_ptr,
    lse_ptr,
    part_ptr,
    x_ptr,
    q_ptr,
    k_ptr,
    alpha_ptr,
    beta_ptr,
    x0_ptr,
    add,
    weighting,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_f_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    stride_x0_n: tl.constexpr,
    scale,
    d: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    IS_BY_SENDER: tl.constexpr,
    IS_ONE_SWEEP: tl.constexpr,
    IS_ABSORBED: tl.constexpr,
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
    q = load_heads(q_ptr + row * stride_q_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
    q = scaled(q, scale)
    top = load_top(weighting)
    if IS_BY_SENDER:
        ax = weighted_sum(
            q, (), lse_ptr, k_ptr, x_ptr, weighting, top, col_ptr, slot_ptr, beg, count,
            stride_k_n, stride_x_n, d, H, d_k, BLOCK_D, VEC_D, N_D, BLOCK_H, BLOCK_K, BLOCK_A,
            VEC_A, N_A, N_H, BLOCK_E, BLOCK_G, IS_ABSORBED,
        )  # fmt: skip
    else:
        if pid_p < n_split:
            lse = load_per_head(lse_ptr + row * H, H, BLOCK_H, N_H, float("inf"))
            if IS_ONE_SWEEP:
                ax = weighted_sum(
                    q, lse, lse_ptr, k_ptr, x_ptr, weighting, top, col_ptr, slot_ptr, beg, count,
                    stride_k_n, stride_x_n, d, H, d_k, BLOCK_D, VEC_D, N_D, BLOCK_H, BLOCK_K,
                    BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G, IS_ABSORBED,
                )  # fmt: skip
        else:
            if IS_ONE_SWEEP:
                ax, m, l = sweep_once(  # noqa: E741
                    q, k_ptr, x_ptr, weighting, top, col_ptr, slot_ptr, beg, count, stride_k_n,
                    stride_x_n, d, H, d_k, BLOCK_D, VEC_D, N_D, BLOCK_H, BLOCK_K, BLOCK_A, VEC_A,
                    N_A, N_H, BLOCK_E, BLOCK_G, IS_ABSORBED,
                )  # fmt: skip
            else:
                m, l = sweep_lse(  # noqa: E741
                    q, k_ptr, weighting, top, col_ptr, slot_ptr, beg, count, stride_k_n, H, d_k,
                    BLOCK_H, BLOCK_K, BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G,
                )  # fmt: skip
            lse = row_lse(m, l, H, BLOCK_H, N_H)
        if not IS_ONE_SWEEP:
            ax = weighted_sum(
                q, lse, lse_ptr, k_ptr, x_ptr, weighting, top, col_ptr, slot_ptr, beg, count,
                stride_k_n, stride_x_n, d, H, d_k, BLOCK_D, VEC_D, N_D, BLOCK_H, BLOCK_K, BLOCK_A,
                VEC_A, N_A, N_H, BLOCK_E, BLOCK_G, IS_ABSORBED,
            )  # fmt: skip
    if pid_p < n_split:
        store_values(part_ptr + pid_p * d, ax, d, BLOCK_D, VEC_D, N_D)
    else:
        store_diffusion(
            f_ptr, ax, x_ptr, alpha_ptr, beta_ptr, x0_ptr, add, row, stride_f_n, stride_x_n,
            stride_x0_n, d, HAS_SOURCE, True, BLOCK_D, VEC_D, N_D,
        )  # fmt: skip
        if not IS_BY_SENDER:
            store_lse(lse_ptr + row * H, lse, H, BLOCK_H, N_H)


def _sizes(
    d: int, h: int, d_k: int, dtype: torch.dtype, *, one_table: bool, by_sender: bool
) -> dict[str, int | bool]:
    """Compile-time sizes and warps; whether k and x are gathered in one sweep, and as one."""
    # Those of x: accumulators take fewer registers than with the lanes of a wider q.
    most = load_columns(dtype) if h == 1 else LANE_COLUMNS  # one accumulator may be wide
    lanes = max(value_lanes(d, most), head_lanes(h, d_k, most) // 4)
    if h >= _MANY_HEADS and dtype.itemsize == 2 and 2 * lanes * vector(d, most) >= 3 * d:
        # A third of the columns would be padding, in the sums of every head: narrow loads cost less.
        lanes, most = max(lanes // 2, head_lanes(h, d_k, most) // 4), 1
    sizes = head_sizes(h, d_k, lanes, load_columns(dtype)) | value_sizes(d, lanes, most)
    heads = sizes["BLOCK_H"] * sizes["N_H"]
    is_one_sweep = not by_sender and heads * sizes["VEC_D"] * sizes["N_D"] <= _ACCUMULATORS
    chunks = [sizes[f"{size}_{table}"] for table in "AD" for size in ("BLOCK", "N")]
    scalars = sizes["BLOCK_H"] if by_sender else 1
    options = {**sizes, **edges(sizes, lanes, _VALUES, scalars=scalars)}
    options |= {"IS_BY_SENDER": by_sender, "IS_ONE_SWEEP": is_one_sweep}
    options["IS_ABSORBED"] = one_table and chunks[:2] == chunks[2:]
    if is_one_sweep and heads >= _MANY_HEADS and torch.version.hip is None:
        options["maxnreg"] = _REGISTERS
    return options


def _is_same(k: Tensor, x: Tensor) -> bool:
    """Whether k is x itself, as one head. `data_ptr` says it not: that of a meta tensor is 0."""
    storages = [t.untyped_storage()._cdata for t in (k, x)]
    rows = [(t.storage_offset(), t.stride(0), t[:1].numel()) for t in (k, x)]
    return storages[0] == storages[1] and rows[0] == rows[1] and k.shape[1] == 1


@launcher
def attention_diffusion_fwd(
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add = (),
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N H"]]:
    """The vector field `f`, and `lse` of the scores."""
    by_sender = weighting is not None and weighting.normalize == "sender"
    of = scoring(weighting, q.shape[2], edge_weight=edge_weight, top=top)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=x.device)
    if by_sender:
        assert csr_t is not None
        write_lse(lse, k, q, scoring=of, csr=csr_t, whole_rows=True)
    else:
        write_lse(lse, q, k, scoring=of, csr=csr, whole_rows=False)
    f = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _field(
        f, lse, x, q=q, k=k, scoring=of, by_sender=by_sender, alpha=alpha, beta=beta, x0=x0,
        add=add, csr=csr,
    )  # fmt: skip
    return f, lse


def _field(
    f: Float[Tensor, "N d"],
    lse: Float[Tensor, "N H"],
    x: Float[Tensor, "N d"],
    *,
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    scoring: Scoring,
    by_sender: bool,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add,
    csr: Csr,
) -> None:
    """Write `f`, and the rows of `lse` that are not yet known."""
    work, d, (n, h, d_k) = csr.work, x.shape[1], q.shape
    if n == 0:
        return
    part = torch.empty((work.n_split, d), dtype=torch.float32, device=x.device)
    _attention_diffusion_fwd_kernel[(work.piece_row.numel(),)](
        f,
        lse,
        part,
        x_ptr=x,
        q_ptr=q,
        k_ptr=k,
        alpha_ptr=alpha,
        beta_ptr=beta,
        x0_ptr=x0,
        add=dense(add),
        weighting=scoring.weighting,
        col_ptr=csr.col,
        slot_ptr=scoring.slot(csr),
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_f_n=f.stride(0),
        stride_x_n=x.stride(0),
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        stride_x0_n=0 if x0 is None else x0.stride(0),
        scale=scoring.dot_scale,
        d=d,
        H=h,
        d_k=d_k,
        HAS_SOURCE=x0 is not None,
        **_sizes(d, h, d_k, x.dtype, one_table=_is_same(k, x), by_sender=by_sender),
    )
    join_diffusion(f, part, x, alpha=alpha, beta=beta, x0=x0, add=add, csr=csr, is_scaled=True)


@launcher
def attention_diffusion_bwd(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    lse: Float[Tensor, "N H"],
    alpha: Float[Tensor, " d"],
    df_scale: float = 0.0,
    csr: Csr,
    csr_t: Csr,
    needs_dqk: bool,
    needs_dalpha: bool,
    needs_dedge_weight: bool = False,
    may_overwrite_k: bool = False,
) -> AttentionGradients:
    """Gradients by `x` (with q and k held fixed), `q`, `k` and `alpha`, those that are needed.

    `may_overwrite_k` is not made use of here: `dk` has memory of its own.
    """
    by_sender = weighting is not None and weighting.normalize == "sender"
    of = scoring(weighting, q.shape[2], edge_weight=edge_weight, top=top)
    dx = torch.empty(x.shape, dtype=torch.float32 if needs_dalpha else x.dtype, device=x.device)
    add: Add = [] if needs_dalpha or not df_scale else [(df_scale, df)]
    of_x: dict[str, Any] = {"dx": dx, "add": add, "is_scaled": not needs_dalpha}
    grads = AttentionGradients()
    if not by_sender:
        lse_delta = None
        if needs_dqk:
            own, lse_delta = bwd_dq(df, x, q, k=k, lse=lse, scoring=of, alpha=alpha, csr=csr)
            grads = grads._replace(dq=own)
        other, dw, dtop = bwd_dk(
            df, x, q, k=k, lse=lse, lse_delta=lse_delta, scoring=of, alpha=alpha, csr=csr_t, **of_x,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
        grads = grads._replace(dk=other, dedge_weight=dw, dtop=dtop)
    elif needs_dqk:
        # As seen from the senders: their rows are those of Aᵀ, and have sums and Delta.
        own, lse_delta = bwd_dq(x, df, k, k=q, lse=lse, scoring=of, alpha=alpha, csr=csr_t, **of_x)
        other, dw, dtop = bwd_dk(
            x, df, k, k=q, lse=lse, lse_delta=lse_delta, scoring=of, alpha=alpha, csr=csr,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
        grads = grads._replace(dq=other, dk=own, dedge_weight=dw, dtop=dtop)
    else:
        # dx = alpha (Aᵀ df − df), and the weights of a row of Aᵀ sum to 1: the field of df there.
        unscaled = torch.ones_like(alpha) if needs_dalpha else alpha
        _field(
            dx, lse.clone(), df, q=k, k=q, scoring=of, by_sender=False, alpha=unscaled, beta=None,
            x0=None, add=add, csr=csr_t,
        )  # fmt: skip
    dalpha = None
    if needs_dalpha:
        residual, dx = dx, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dalpha = finish_field_gradient(dx, residual, x, df=df, alpha=alpha, df_scale=df_scale)
    return grads._replace(dx=dx, dalpha=dalpha)
