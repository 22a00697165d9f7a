"""attention_diffusion: f[i,:] = alpha · (mean_h Σ_{e in row i} a[e,h] · x[col[e],:] − x[i,:])
                                + beta · x0[i,:],   a = edge_attention(q, k)

Work:     one task per 4096 edges; a row is swept twice: its scores, as many edges at a time as
          fill a register with edges × heads, then its weighted sum of x.
Bytes:    4(N+1) + 4E + 4NH + b(2Nd + 2N·d_att), b bytes per element, if each row of x and k is
          read once; 4(N+1) + 4E + 4NH + b(N(d + d_att) + E(d + d_att)) if none is reused.
Backward: two passes that recompute the weights (`_attention_backward.py`); nothing of size E.
          Saves x, q, k and lse.
Order:    one writer per output element, edges summed in CSR order, the longest rows piece by
          piece: bitwise repeatable for any number of threads.
"""

from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._column_pass import column_pass
from grand_fast.kernels._cpu import Compiled, each_row
from grand_fast.kernels._csr import Add, Csr
from grand_fast.kernels._diffusion import (
    Term,
    add_arguments,
    ahead,
    block_of,
    channel_blocks,
    field_rows,
    finish_field,
    prefetch_rows,
    store_field,
    store_partial,
    weighted_sum,
)
from grand_fast.kernels._edge_scores import (
    RowBuffer,
    buffer_size,
    combine_lse,
    head_groups,
    softmax,
)
from grand_fast.kernels._memory import empty
from grand_fast.kernels._row_pass import row_pass
from grand_fast.kernels._simd import Chunk, Int, Kernel
from grand_fast.kernels._weighting import AttentionGradients, Weighting, only_default


@lru_cache(maxsize=256)
def _attention_diffusion_fwd_kernel(
    d: int,
    h: int,
    d_k: int,
    dtype: torch.dtype,
    index: torch.dtype,
    *,
    has_source: bool,
    n_add: int,
    step: Literal["whole", "lse", "sum"],
) -> Compiled:
    """`whole` rows; or for pieces of long rows first their `lse`, then, lse known, their `sum`."""
    k = Kernel(f"attention_diffusion_fwd_{step}", dtype, index)
    x, q, key, col, lse = (
        k.matrix("x"),
        k.matrix("q"),
        k.matrix("k"),
        k.indices("col"),
        k.matrix("lse"),
    )
    scratch = k.matrix("scratch").row(k.thread)
    whole = step == "whole"
    own_rows = [(q, h * d_k), (lse, h)]
    if whole:
        own_rows += field_rows(k, d, has_source=has_source, n_add=n_add)
    with each_row(k, pieces=not whole, own_rows=own_rows) as row:
        for group in head_groups(k, h, d_k):
            weights = RowBuffer(scratch, group, row)
            further = scratch.at(k.number("buffer")) if group.first else scratch
            scores = RowBuffer(further, group, row)
            normaliser = softmax(
                group, row, q, key, col, lse, scores, [(key, h * d_k)], known=step == "sum"
            )
            mean = normaliser * group.of_heads(1.0 / h)
            with k.loop(row.begin, row.end, group.edges) as e:
                w = group.over_heads(scores.at(e).load() * mean)
                weights.at(e).store(w + weights.at(e).load() if group.first else w)
        for block in channel_blocks(d, k.lanes) if step != "lse" else []:

            def prefetch(e: Int, block: list[Chunk] = block) -> None:
                prefetch_rows(col, ahead(k, e), [block_of(x, block)])

            weight = weights.splat()
            terms = [Term(x, c, weight) for c in block]
            ax = weighted_sum(k, row, col, terms, prefetch=prefetch)
            if step == "sum":
                store_partial(k, "partial", row, block, ax)
            else:
                store_field(k, row, block, ax, x, has_source=has_source, n_add=n_add)
    return Compiled(k)


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
    only_default(weighting, q.shape[2], edge_weight)
    n, d = x.shape
    _, h, d_k = q.shape
    work, has_source = csr.work, x0 is not None
    f = empty(n, d, dtype=x.dtype)
    lse = empty(n, h, dtype=x.dtype)
    alpha = alpha.to(x.dtype)
    shape = (d, h, d_k, x.dtype, csr.col.dtype)
    buffer = buffer_size(work.longest)
    arguments: dict[str, Any] = {"x": x, "q": q, "k": k, "alpha": alpha, "f": f, "buffer": buffer}
    arguments |= {"col": csr.col, "rowptr": csr.rowptr, "last_edge": csr.col.numel() - 1}
    if beta is not None and x0 is not None:
        beta = beta.to(x.dtype)
        arguments |= {"beta": beta, "x0": x0}
    arguments |= add_arguments(add, x.dtype)
    _attention_diffusion_fwd_kernel(*shape, has_source=has_source, n_add=len(add), step="whole")(
        work, pieces=False, scratch=2 * buffer, lse=lse, **arguments
    )
    if work.hub_rows.numel():
        kernel = _attention_diffusion_fwd_kernel(*shape, has_source=False, n_add=0, step="lse")
        partial_lse = empty(work.piece_begin.numel(), h, dtype=x.dtype)
        kernel(work, pieces=True, scratch=2 * buffer, lse=partial_lse, **arguments)
        lse[work.hub_rows] = combine_lse(partial_lse, work)
        kernel = _attention_diffusion_fwd_kernel(*shape, has_source=False, n_add=0, step="sum")
        partial = empty(work.piece_begin.numel(), d, dtype=x.dtype)
        kernel(work, pieces=True, scratch=2 * buffer, lse=lse, partial=partial, **arguments)
        finish_field(f, partial, work, x=x, alpha=alpha, beta=beta, x0=x0, add=add)
    return f, lse


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
    """`dx` with q and k held fixed, and `dq`, `dk`, `dalpha` if needed.

    `may_overwrite_k`: `dk` is then written over `k`, of which a row of the column pass reads its
    own alone.
    """
    alpha = alpha.to(x.dtype)
    dq = dk = delta = None
    if needs_dqk:
        dq = empty(*q.shape, dtype=q.dtype)
        dk = k if may_overwrite_k else empty(*k.shape, dtype=k.dtype)
        lse, delta = row_pass(q, k, lse=lse, csr=csr, df=df, x=x, alpha=alpha, dq=dq)
    dx, dalpha = column_pass(
        q,
        k,
        lse=lse,
        delta=delta,
        csr_t=csr_t,
        df=df,
        x=x,
        alpha=alpha,
        df_scale=df_scale,
        needs_dalpha=needs_dalpha,
        dk=dk,
    )
    assert dx is not None
    return AttentionGradients(dx=dx, dq=dq, dk=dk, dalpha=dalpha)
