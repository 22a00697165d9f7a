"""attention_product: y[i,h,:] = Σ_{e in row i} a[e,h] · (v[col[e],h,:] + edge_value[e,h,:]),
    a[e,h] = softmax over row i of s[e,h] = <q[i,h,:], k[col[e],h,:] + edge_key[e,h,:]> / √d_k
    or whatever else a `Weighting` says (`gpu/attention/scores.py`); or the mean over heads of y.

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of k and v a
          turn. One sweep by online softmax: a lane sums the columns of v that it reads, and they
          are of the heads whose scores it knows. A hub's norm needs all its pieces: they are swept
          first by a kernel of their own.
Bytes:    4(N+1) + 4E + b·NH(2d + 2d_k) + 8NH, b bytes per element, if each row is read once;
          4(N+1) + 4E + b(NH(d + d_k) + EH(d + d_k)) + 8NH if no row is reused between receivers; y
          takes b·Nd instead of b·NHd if it is a mean. Tables of edges take b·EH(d_k + d) more, once
          more for hubs; the list of pieces adds 12N.
Backward: per head ds = p (t − Delta[i]), t = <dy[i,h], v[col[e],h] + edge_value[e,h]>,
          Delta[i] = Σ_{e in row i} p · t. A row pass over the CSR of A gives dq and Delta; a column
          pass over that of Aᵀ dk, dv = Σ a dy, and of each edge dedge_key = du q and
          dedge_value = a dy. Both compute p again from q, k and norm, as those of
          attention_diffusion do: nothing of size E is saved.
Senders:  where they normalise, a sweep over the CSR of Aᵀ writes norm of every sender, and an edge
          gathers it beside k and v. The passes of the backward change places: that over Aᵀ gives
          dk, Delta and dv, that over A dq and the gradients of edges.
Order:    one writer per output element; edges summed in CSR order, pieces of a hub in theirs:
          bitwise repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.backward import attention_bwd
from grand_fast.kernels.gpu.attention.backward_far_side import join_rows
from grand_fast.kernels.gpu.attention.normalizer import (
    SWEEP_VALUES,
    load_norm,
    norm_of,
    store_norm,
    write_norm,
)
from grand_fast.kernels.gpu.attention.scores import kernel_weighting, load_top
from grand_fast.kernels.gpu.attention.weight_gradient import Product
from grand_fast.kernels.gpu.attention.weighted_sum import Tables, sweep_values
from grand_fast.kernels.gpu.pieces import launcher, view_of
from grand_fast.kernels.gpu.sizes import edges, product_sizes
from grand_fast.kernels.gpu.sums import mean_over_heads
from grand_fast.kernels.gpu.tiles import load_piece, load_row, store_piece
from grand_fast.kernels.weighting import ProductGradients, Upstream, Weighting

_VALUES = 32  # of the gathered tiles, per lane


@triton.jit(do_not_specialize=["n_split"])
def _attention_product_fwd_kernel(
    y_ptr,
    norm_ptr,
    part_ptr,
    q_ptr,
    tables,
    weighting,
    view,
    n_split,
    stride_q_n: tl.constexpr,
    IS_MEAN: tl.constexpr,
    IS_ONE_SWEEP: tl.constexpr,
    sizes: tl.constexpr,
    x_sizes: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    q = load_row("heads", q_ptr + row * stride_q_n, sizes)
    top = load_top(weighting)
    if IS_ONE_SWEEP:
        if pid_p < n_split:
            shift, inverse = load_norm(norm_ptr, row, weighting, sizes)
            y, _, _ = sweep_values(
                q, shift, inverse, norm_ptr, tables, weighting, top, view, beg, count, False, sizes,
                x_sizes,
            )  # fmt: skip
        else:
            y, m, l = sweep_values(  # noqa: E741
                q, (), (), norm_ptr, tables, weighting, top, view, beg, count, True, sizes, x_sizes
            )
            shift, inverse = norm_of(m, l, sizes)
            store_norm(norm_ptr, row, shift, inverse, weighting, sizes)
    else:
        y, _, _ = sweep_values(
            q, (), (), norm_ptr, tables, weighting, top, view, beg, count, False, sizes, x_sizes
        )
    if IS_MEAN:
        mean = mean_over_heads(y, x_sizes)
        store_piece("values", y_ptr, part_ptr, mean, row, pid_p, n_split, x_sizes)
    else:
        store_piece("heads", y_ptr, part_ptr, y, row, pid_p, n_split, x_sizes)


@launcher
def attention_product_fwd(
    v: Float[Tensor, "N H d"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_key: Float[Tensor, "E H d_k"] | None = None,
    edge_value: Float[Tensor, "E H d"] | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    mean_heads: bool,
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "N H d"] | Float[Tensor, "N d"], Float[Tensor, "N 2 H"]]:
    """The weighted sums `y` of each head (their mean if `mean_heads`), and `norm` of the scores."""
    by_sender = weighting is not None and weighting.normalize == "sender"
    work, (n, h, d), d_k = csr.work, v.shape, q.shape[2]
    of = kernel_weighting(weighting, d_k, edge_weight=edge_weight, top=top, edge_key=edge_key)
    y = torch.empty((n, d) if mean_heads else (n, h, d), dtype=v.dtype, device=v.device)
    norm = torch.empty((n, 2, h), dtype=torch.float32, device=v.device)
    if n == 0:
        return y, norm
    options = _norm_options(h, d, d_k)
    if by_sender:
        assert csr_t is not None
        write_norm(norm, k, q, weighting=of, csr=csr_t, whole_rows=True, options=options)
    else:
        write_norm(norm, q, k, weighting=of, csr=csr, whole_rows=False, options=options)
    part = torch.empty((work.n_split, y[0].numel()), dtype=torch.float32, device=v.device)
    strides = (tl.constexpr(t.stride(0)) for t in (k, v))
    _attention_product_fwd_kernel[(work.piece_row.numel(),)](
        y, norm, part, q_ptr=q, tables=Tables(k, v, edge_value, *strides), weighting=of,
        view=view_of(csr), n_split=work.n_split, stride_q_n=q.stride(0),
        IS_MEAN=mean_heads, IS_ONE_SWEEP=not by_sender,
        **product_sizes(h, d, d_k, _VALUES, per_head=by_sender),
    )  # fmt: skip
    join_rows(y, part, csr)
    return y, norm


@launcher
def attention_product_bwd(
    dy: Float[Tensor, "N H d"] | Float[Tensor, "N d"],
    v: Float[Tensor, "N H d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    weighting: Weighting | None = None,
    edge_key: Float[Tensor, "E H d_k"] | None = None,
    edge_value: Float[Tensor, "E H d"] | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    norm: Float[Tensor, "N 2 H"],
    csr: Csr,
    csr_t: Csr,
    needs_dv: bool,
    needs_dqk: bool,
    needs_dedge_key: bool = False,
    needs_dedge_value: bool = False,
    needs_dedge_weight: bool = False,
) -> ProductGradients:
    """The gradients that are needed; `dy` of shape [N, d] is that of the mean over heads."""
    by_sender = weighting is not None and weighting.normalize == "sender"
    h, d_k = q.shape[1:]
    of = kernel_weighting(weighting, d_k, edge_weight=edge_weight, top=top, edge_key=edge_key)

    def made(table: Tensor | None, is_needed: bool) -> Tensor | None:
        if table is None or not is_needed:
            return None
        return torch.empty(table.shape, dtype=table.dtype, device=table.device)

    part = torch.empty((csr_t.work.n_split, h * v.shape[2]), dtype=torch.float32, device=v.device)
    product = Product(
        made(v, needs_dv),
        part=part,
        dedge_key=made(edge_key, needs_dedge_key),
        dedge_value=made(edge_value, needs_dedge_value),
    )
    grads = attention_bwd(
        q, k, Upstream(df=dy, x=v, edge_value=edge_value), weighting=of, by_sender=by_sender,
        norm=norm, csr=csr, csr_t=csr_t, product=product, needs_dqk=needs_dqk or by_sender,
        needs_dedge_weight=needs_dedge_weight,
    )  # fmt: skip
    if product.dv is not None:
        join_rows(product.dv, part, csr_t)
    return ProductGradients(
        dv=product.dv, dq=grads.dq, dk=grads.dk, dedge_key=product.dedge_key,
        dedge_value=product.dedge_value, dedge_weight=grads.dedge_weight, dtop=grads.dtop,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _norm_options(h: int, d: int, d_k: int) -> dict[str, Any]:
    """Compile-time sizes and warps of `write_norm`, with those of the forward for q and k."""
    return edges(product_sizes(h, d, d_k, _VALUES)["sizes"], SWEEP_VALUES)
