"""attention_diffusion: f[i,:] = alpha · (Σ_{e in row i} w[e] · x[col[e],:] − x[i,:])
                                + beta · x0[i,:],
    w[e] = mean_h softmax over row i of s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k
    or whatever else a `Weighting` says (`gpu/attention/scores.py`).

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of k and x a
          turn. In one sweep by online softmax where an accumulator for each head fits in the
          registers. Else in two: norm, then w and the sum; with norm known one accumulator serves
          all heads, so H does not cost registers. A hub's norm needs all its pieces: they are swept
          first by a kernel of their own. Where k is x itself, as one head, a row is gathered once
          for both: the projection of the keys is then absorbed into q.
Bytes:    4(N+1) + 4E + b·2N(d + d_att) + 8NH, b bytes per element, if each row is read once;
          4(N+1) + 4E + b(2Nd + Nd_att + E(d + d_att)) + 8NH if no row is reused between receivers
          (a second sweep finds a row's k in cache), counting x[i] among the latter's rows of x;
          b·Nd more with a source; the list of pieces adds 12N.
Backward: per head ds = p (t − Delta[i]) / H, t = <alpha · df[i], x[col[e]]>,
          Delta[i] = Σ_{e in row i} p · t. A row pass over the CSR of A gives dq and Delta; a column
          pass over that of Aᵀ gives dk and dx = alpha · (Σ w · df − df); it gathers norm and Delta,
          laid side by side (12H an edge). Both compute p again from q, k and norm, of which the row
          pass takes the shift alone and hands on its own sum: nothing of size E is saved.
          The head mean hides Delta: <df, f> would not give it.
          dalpha[d] = Σ_j x_j · (Aᵀ df − df)_j, by a pass over N that also scales dx; the bracket is
          stored in float32 in between.
Senders:  where they normalise, a sweep over the CSR of Aᵀ writes norm of every sender, and an edge
          gathers it beside k and x (8H·E more at most). The passes of the backward change places:
          that over Aᵀ gives dk, Delta and dx, that over A dq.
Weights:  an edge's is read at its slot of A in every sweep (4E each, and the slots 4E over Aᵀ); its
          gradient is written by the pass that gathers Delta.
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
from grand_fast.kernels.gpu.attention.backward import attention_bwd
from grand_fast.kernels.gpu.attention.normalizer import (
    SWEEP_VALUES,
    load_norm,
    norm_of,
    store_norm,
    sweep_scores,
    write_norm,
)
from grand_fast.kernels.gpu.attention.scores import KernelWeighting, kernel_weighting, load_top
from grand_fast.kernels.gpu.attention.weighted_sum import sweep_once, weighted_sum
from grand_fast.kernels.gpu.diffusion import (
    Field,
    field_of,
    finish_field_gradient,
    join_field,
    store_field,
)
from grand_fast.kernels.gpu.pieces import launcher
from grand_fast.kernels.gpu.sizes import (
    LANE_COLUMNS,
    edges,
    head_lanes,
    head_sizes,
    load_columns,
    value_lanes,
    value_sizes,
    vector,
)
from grand_fast.kernels.gpu.tiles import load_piece, load_row, store_row
from grand_fast.kernels.weighting import AttentionGradients, Upstream, Weighting

_VALUES = 32  # of the gathered tiles, per lane
# One sweep has an accumulator per head, of so many elements a lane together; with more heads a
# second gather of k costs less than the registers.
_ACCUMULATORS = 40
# For A100 and H100 NVIDIA's compiler starts the exchanges of many heads early, each in registers of
# its own: 118 of them, or 96 if told so, which lets 20 warps be resident instead of 16.
# For Blackwell it would stay at 96 by itself, and spill.
_MANY_HEADS, _REGISTERS, REGISTERS_OF_BLACKWELL = 8, 96, 120


@triton.jit(do_not_specialize=["n_split"])
def _attention_diffusion_fwd_kernel(
    field,
    norm_ptr,
    q_ptr,
    k_ptr,
    weighting,
    view,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    IS_BY_SENDER: tl.constexpr,
    IS_ONE_SWEEP: tl.constexpr,
    IS_ABSORBED: tl.constexpr,
    sizes: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    q = load_row("heads", q_ptr + row * stride_q_n, sizes)
    top = load_top(weighting)
    if IS_BY_SENDER:
        ax = weighted_sum(
            q, (), (), norm_ptr, k_ptr, field, weighting, top, view, beg, count, stride_k_n,
            IS_ABSORBED, sizes,
        )  # fmt: skip
    else:
        if pid_p < n_split:
            shift, inverse = load_norm(norm_ptr, row, weighting, sizes)
            if IS_ONE_SWEEP:
                ax = weighted_sum(
                    q, shift, inverse, norm_ptr, k_ptr, field, weighting, top, view, beg, count,
                    stride_k_n, IS_ABSORBED, sizes,
                )  # fmt: skip
        else:
            if IS_ONE_SWEEP:
                ax, m, l = sweep_once(  # noqa: E741
                    q, k_ptr, field, weighting, top, view, beg, count, stride_k_n, IS_ABSORBED,
                    sizes,
                )  # fmt: skip
            else:
                m, l = sweep_scores(  # noqa: E741
                    q, k_ptr, weighting, top, view, beg, count, stride_k_n, sizes
                )
            shift, inverse = norm_of(m, l, sizes)
        if not IS_ONE_SWEEP:
            ax = weighted_sum(
                q, shift, inverse, norm_ptr, k_ptr, field, weighting, top, view, beg, count,
                stride_k_n, IS_ABSORBED, sizes,
            )  # fmt: skip
    if pid_p < n_split:
        store_row("values", field.part + pid_p * sizes.d, ax, sizes)
    else:
        store_field(field, ax, row, sizes)
        if not IS_BY_SENDER:
            store_norm(norm_ptr, row, shift, inverse, weighting, sizes)


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
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N 2 H"]]:
    """The vector field `f`, and `norm` of the scores."""
    by_sender = weighting is not None and weighting.normalize == "sender"
    n, h, d_k = q.shape
    of = kernel_weighting(weighting, d_k, edge_weight=edge_weight, top=top)
    norm = torch.empty((n, 2, h), dtype=torch.float32, device=x.device)
    options = _norm_options(x.shape[1], h, d_k, x.dtype)
    if by_sender:
        assert csr_t is not None
        write_norm(norm, k, q, weighting=of, csr=csr_t, whole_rows=True, options=options)
    else:
        write_norm(norm, q, k, weighting=of, csr=csr, whole_rows=False, options=options)
    f = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    field = field_of(f, x, alpha=alpha, beta=beta, x0=x0, add=add, csr=csr)
    _write_field(field, norm, q, k, weighting=of, by_sender=by_sender, csr=csr)
    return f, norm


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
    norm: Float[Tensor, "N 2 H"],
    alpha: Float[Tensor, " d"],
    x_scale: float = 0.0,
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
    of = kernel_weighting(weighting, q.shape[2], edge_weight=edge_weight, top=top)
    dx = torch.empty(x.shape, dtype=torch.float32 if needs_dalpha else x.dtype, device=x.device)
    add: Add = [] if needs_dalpha or not x_scale else [(x_scale, df)]
    field = field_of(dx, df, alpha=None if needs_dalpha else alpha, add=add, csr=csr_t)
    if needs_dqk or not by_sender:
        grads = attention_bwd(
            q, k, Upstream(df=df, x=x, alpha=alpha), weighting=of, by_sender=by_sender, norm=norm,
            csr=csr, csr_t=csr_t, field=field, needs_dqk=needs_dqk,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
    else:
        # dx = alpha (Aᵀ df − df), and the weights of a row of Aᵀ sum to 1: the field of df there.
        grads = AttentionGradients()
        _write_field(field, norm.clone(), k, q, weighting=of, by_sender=False, csr=csr_t)
    dalpha = None
    if needs_dalpha:
        residual, dx = dx, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dalpha = finish_field_gradient(dx, residual, x, df=df, alpha=alpha, x_scale=x_scale)
    return grads._replace(dx=dx, dalpha=dalpha)


def _write_field(
    field: Field,
    norm: Float[Tensor, "N 2 H"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: KernelWeighting,
    by_sender: bool,
    csr: Csr,
) -> None:
    """Write the field, and the rows of `norm` that are not yet known."""
    work, x, (n, h, d_k) = csr.work, field.x, q.shape
    if n == 0:
        return
    options = _options(
        x.shape[1], h, d_k, x.dtype, x.device, one_table=_is_same(k, x), by_sender=by_sender
    )
    _attention_diffusion_fwd_kernel[(work.piece_row.numel(),)](
        field, norm, q, k_ptr=k, weighting=weighting, view=weighting.view(csr),
        n_split=work.n_split, stride_q_n=q.stride(0), stride_k_n=k.stride(0), **options,
    )  # fmt: skip
    join_field(field, csr)


def _lanes(d: int, h: int, d_k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Lanes that read a row, and columns of x that one of them reads at most at once."""
    # Those of x: accumulators take fewer registers than with the lanes of a wider q.
    most = load_columns(dtype) if h == 1 else LANE_COLUMNS  # one accumulator may be wide
    lanes = max(value_lanes(d, most), head_lanes(h, d_k, most) // 4)
    if h >= _MANY_HEADS and dtype.itemsize == 2 and 2 * lanes * vector(d, most) >= 3 * d:
        # A third of all columns would be padding, in every head's sums: narrow loads cost less.
        lanes, most = max(lanes // 2, head_lanes(h, d_k, most) // 4), 1
    return lanes, most


def _key_sizes(d: int, h: int, d_k: int, dtype: torch.dtype) -> dict[str, int]:
    return head_sizes(h, d_k, _lanes(d, h, d_k, dtype)[0], load_columns(dtype))


@lru_cache(maxsize=256)
def _norm_options(d: int, h: int, d_k: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time sizes and warps of `write_norm`, with those of the forward for q and k."""
    return edges(_key_sizes(d, h, d_k, dtype), SWEEP_VALUES)


@lru_cache(maxsize=256)
def _options(
    d: int,
    h: int,
    d_k: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    one_table: bool,
    by_sender: bool,
) -> dict[str, Any]:
    """Compile-time sizes and warps; whether k and x are gathered in one sweep, and as one."""
    lanes, most = _lanes(d, h, d_k, dtype)
    sizes = _key_sizes(d, h, d_k, dtype) | value_sizes(d, lanes, most)
    heads = sizes["BLOCK_H"] * sizes["N_H"]
    is_one_sweep = not by_sender and heads * sizes["VEC_D"] * sizes["N_D"] <= _ACCUMULATORS
    chunks = [sizes[f"{size}_{table}"] for table in "AD" for size in ("BLOCK", "N")]
    scalars = sizes["BLOCK_H"] if by_sender else 1
    options = edges(sizes, _VALUES, scalars=scalars)
    options |= {"IS_BY_SENDER": by_sender, "IS_ONE_SWEEP": is_one_sweep}
    options["IS_ABSORBED"] = one_table and chunks[:2] == chunks[2:]
    if is_one_sweep and heads >= _MANY_HEADS and torch.version.hip is None:
        is_blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)
        options["maxnreg"] = REGISTERS_OF_BLACKWELL if is_blackwell else _REGISTERS
    return options


def _is_same(k: Tensor, x: Tensor) -> bool:
    """Whether k is x itself, as one head. `data_ptr` says it not: that of a meta tensor is 0."""
    storages = [t.untyped_storage()._cdata for t in (k, x)]
    rows = [(t.storage_offset(), t.stride(0), t[:1].numel()) for t in (k, x)]
    return storages[0] == storages[1] and rows[0] == rows[1] and k.shape[1] == 1
