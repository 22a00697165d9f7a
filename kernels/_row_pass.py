"""The row pass of the edge attention's backward: Δ and dq (see `_attention_backward.py`)."""

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from grand_fast.kernels._attention_backward import (
    Source,
    given,
    head_terms,
    score_gradient,
    source_of,
    weight_gradient_of,
)
from grand_fast.kernels._cpu import Compiled, each_row, sum_pieces
from grand_fast.kernels._csr import Csr
from grand_fast.kernels._diffusion import MAX_ACCUMULATORS, store_partial, weighted_sum
from grand_fast.kernels._edge_scores import (
    RowBuffer,
    block_scores,
    block_slots,
    buffer_size,
    head_groups,
    load_heads,
    prefetch_block,
)
from grand_fast.kernels._memory import empty
from grand_fast.kernels._simd import Kernel
from grand_fast.kernels._simd_math import exp, fma


@lru_cache(maxsize=256)
def _row_kernel(
    d: int,
    h: int,
    d_k: int,
    dtype: torch.dtype,
    index: torch.dtype,
    *,
    source: Source,
    step: Literal["whole", "delta", "dq"],
) -> Compiled:
    """`whole` rows; or for pieces of long rows first their `delta`, then, Δ known, their `dq`."""
    k = Kernel(f"attention_bwd_row_{step}", dtype, index)
    q, key, col = k.matrix("q"), k.matrix("k"), k.indices("col")
    lse, delta = k.matrix("lse"), k.matrix("delta")
    scratch = k.matrix("scratch").row(k.thread)
    whole, has_state = step == "whole", source == "state"
    tables = [(key, h * d_k)] + ([(k.matrix("x"), d)] if has_state else [])
    own_rows = [(q, h * d_k), (lse, h), (delta, h)]
    if whole:
        own_rows += [(k.matrix("dq"), h * d_k), (k.matrix("lse_beside_delta"), h)]
    if has_state:
        own_rows += [(k.matrix("df"), d)]
    with each_row(k, pieces=not whole, own_rows=own_rows) as row:
        weight_gradient = weight_gradient_of(k, source, d, h, row, own="df", others="x")
        for group in head_groups(k, h, d_k):
            p_buffer = RowBuffer(scratch, group, row)
            t_buffer = RowBuffer(scratch.at(k.number("buffer")), group, row)
            own_q, own_lse = load_heads(group, q.row(row.node)), group.load([lse.row(row.node)])
            sums = k.variable(k.splat(0.0))
            with k.loop(row.begin, row.end, group.edges) as e:
                prefetch_block(group, col, e, tables)
                slots = block_slots(group, row, e)
                senders = [col[slot] for slot in slots]
                s = block_scores(group, own_q, [key.row(j) for j in senders])
                p = exp(s - own_lse).first((row.end - e) * group.width, k.splat(0.0))
                t = weight_gradient(group, slots, senders)
                sums.value = fma(p, t, sums.value)
                p_buffer.at(e).store(p)
                t_buffer.at(e).store(t)
            if step == "dq":
                row_delta = group.load([delta.row(row.node)])
            else:
                row_delta = group.over_edges(sums.value)
                group.store(delta.row(row.out), row_delta)
            if step == "whole":
                group.store(k.matrix("lse_beside_delta").row(row.node), own_lse)
            if step == "delta":
                continue
            with k.loop(row.begin, row.end, group.edges) as e:
                p, t = p_buffer.at(e).load(), t_buffer.at(e).load()
                p_buffer.at(e).store(score_gradient(group, source, h, p, t, row_delta))
            terms = head_terms(group, key, p_buffer)
            for i in range(0, len(terms), MAX_ACCUMULATORS):
                block = terms[i : i + MAX_ACCUMULATORS]
                dq = weighted_sum(k, row, col, block)
                store_partial(k, "dq", row, [term.chunk for term in block], dq)
    return Compiled(k)


def row_pass(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor,
    csr: Csr,
    df: Tensor | None = None,
    x: Tensor | None = None,
    alpha: Tensor | None = None,
    da: Tensor | None = None,
    dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write `dq`; return `lse` and Δ `[N, H]`, side by side in memory for the column pass."""
    n, h, d_k = q.shape
    source, d = source_of(x, da)
    work, shape = csr.work, (d, h, d_k, q.dtype, csr.col.dtype)
    lse_beside_delta, delta = empty(n, 2, h, dtype=q.dtype).unbind(1)
    buffer = buffer_size(work.longest)
    arguments: dict[str, Any] = {"q": q, "k": k, "lse": lse, "buffer": buffer} | given(
        df, x, alpha, da
    )
    arguments |= {"col": csr.col, "rowptr": csr.rowptr, "last_edge": csr.col.numel() - 1}
    kernel = _row_kernel(*shape, source=source, step="whole")
    outputs = {"delta": delta, "dq": dq, "lse_beside_delta": lse_beside_delta}
    kernel(work, pieces=False, scratch=2 * buffer, **outputs, **arguments)
    if work.hub_rows.numel():
        pieces = work.piece_begin.numel()
        partial_delta = empty(pieces, h, dtype=q.dtype)
        kernel = _row_kernel(*shape, source=source, step="delta")
        kernel(work, pieces=True, scratch=2 * buffer, delta=partial_delta, **arguments)
        lse_beside_delta[work.hub_rows] = lse[work.hub_rows]
        delta[work.hub_rows] = sum_pieces(partial_delta, work)
        partial = empty(pieces, h, d_k, dtype=q.dtype)
        kernel = _row_kernel(*shape, source=source, step="dq")
        kernel(work, pieces=True, scratch=2 * buffer, delta=delta, dq=partial, **arguments)
        dq[work.hub_rows] = sum_pieces(partial, work)
    return lse_beside_delta, delta
