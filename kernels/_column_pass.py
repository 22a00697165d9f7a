"""The column pass of the edge attention's backward: dk and dx (see `_attention_backward.py`)."""

from functools import lru_cache
from typing import Any

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
from grand_fast.kernels._cpu import Compiled, Shares, each_row, sum_pieces
from grand_fast.kernels._csr import Csr
from grand_fast.kernels._diffusion import (
    MAX_ACCUMULATORS,
    Term,
    accumulate,
    finish_field_gradient,
    store_field_gradient,
    store_partial,
    stretches,
)
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
from grand_fast.kernels._simd import Kernel, chunks
from grand_fast.kernels._simd_math import exp

_COLUMN_EDGES = 32  # the rows that the column pass reads twice stay in the nearest cache


@lru_cache(maxsize=256)
def _column_kernel(
    d: int,
    h: int,
    d_k: int,
    dtype: torch.dtype,
    index: torch.dtype,
    *,
    source: Source,
    needs_dk: bool,
    needs_dalpha: bool,
    pieces: bool,
) -> Compiled:
    k = Kernel("attention_bwd_column", dtype, index)
    q, key, col = k.matrix("q"), k.matrix("k"), k.indices("col")
    lse = k.matrix("lse")
    scratch = k.matrix("scratch").row(k.thread)
    buffer = k.number("buffer")
    has_state = source == "state"
    tables = [(q, h * d_k), (lse, h)] + ([(k.matrix("df"), d)] if has_state else [])
    groups = head_groups(k, h, d_k)
    channels = chunks(d, k.lanes) if has_state else []
    heads = [c for group in groups for i in range(group.count) for c in group.channels(i)]
    own_rows = [(key, h * d_k)]
    if needs_dk:
        own_rows += [(k.matrix("dk"), h * d_k)]
    if has_state and not pieces:
        own_rows += [(k.matrix(name), d) for name in ("x", "df", "dx")]
    with each_row(k, pieces=pieces, own_rows=own_rows) as row:
        weight_gradient = weight_gradient_of(k, source, d, h, row, own="x", others="df")
        own_k = [load_heads(group, key.row(row.node)) for group in groups]
        dk = [k.variable(k.splat(0.0)) for _ in heads] if needs_dk else []
        atg = [k.variable(k.splat(0.0)) for _ in channels]
        with stretches(k, row, _COLUMN_EDGES) as part:
            terms: list[Term] = []
            for number, (group, own) in enumerate(zip(groups, own_k, strict=True)):
                w_buffer = RowBuffer(scratch, group, part)
                ds_buffer = RowBuffer(scratch.at(buffer * (number + 1)), group, part)
                with k.loop(part.begin, part.end, group.edges) as e:
                    prefetch_block(group, col, e, tables)
                    slots = block_slots(group, part, e)
                    receivers = [col[slot] for slot in slots]
                    s = block_scores(group, own, [q.row(i) for i in receivers])
                    p = exp(s - group.load([lse.row(i) for i in receivers]))
                    p = p.first((part.end - e) * group.width, k.splat(0.0))
                    if needs_dk:
                        t = weight_gradient(group, slots, receivers)
                        delta = group.load([k.matrix("delta").row(i) for i in receivers])
                        ds_buffer.at(e).store(score_gradient(group, source, h, p, t, delta))
                    if has_state:
                        w = group.over_heads(p * group.of_heads(1.0 / h))
                        w_buffer.at(e).store(w + w_buffer.at(e).load() if number else w)
                if needs_dk:
                    terms += head_terms(group, q, ds_buffer)
            if has_state:
                terms += [Term(k.matrix("df"), c, w_buffer.splat()) for c in channels]
            totals = dk + atg
            for i in range(0, len(terms), MAX_ACCUMULATORS):
                j = i + MAX_ACCUMULATORS
                accumulate(k, part, col, terms[i:j], totals[i:j])
        if needs_dk:
            store_partial(k, "dk", row, heads, [total.value for total in dk])
        if has_state:
            sums = [total.value for total in atg]
            if pieces:
                store_partial(k, "partial", row, channels, sums)
            else:
                df = k.matrix("df")
                store_field_gradient(k, row, channels, sums, df, needs_dalpha=needs_dalpha)
    return Compiled(k)


def column_pass(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor,
    delta: Tensor | None,
    csr_t: Csr,
    df: Tensor | None = None,
    x: Tensor | None = None,
    alpha: Tensor | None = None,
    df_scale: float = 0.0,
    da: Tensor | None = None,
    needs_dalpha: bool = False,
    dk: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write `dk` if it is given, with Δ; return `dx` and, if needed, `dalpha` of a diffusion."""
    n, h, d_k = q.shape
    source, d = source_of(x, da)
    work, shape = csr_t.work, (d, h, d_k, q.dtype, csr_t.col.dtype)
    buffer = buffer_size(_COLUMN_EDGES)
    scratch = buffer * (1 + h)  # the mean weights, and ds of each group of heads
    arguments: dict[str, Any] = {"q": q, "k": k, "lse": lse, "buffer": buffer} | given(
        df, x, alpha, da
    )
    arguments |= {"col": csr_t.col, "rowptr": csr_t.rowptr, "slot": csr_t.slot}
    arguments["last_edge"] = csr_t.col.numel() - 1
    dx = shares = dalpha = None
    if dk is not None:
        arguments["delta"] = delta
    if x is not None:
        dx = empty(n, d, dtype=q.dtype)
        if needs_dalpha:
            shares = Shares(work.turn.numel(), d, q.dtype)
            arguments["dalpha"] = shares.tensor
        arguments["df_scale"] = q.new_tensor([df_scale])
    switches: dict[str, Any] = {"source": source, "needs_dk": dk is not None}
    kernel = _column_kernel(*shape, **switches, needs_dalpha=needs_dalpha, pieces=False)
    outputs: dict[str, Any] = {"dk": dk, "dx": dx}
    kernel(work, pieces=False, scratch=scratch, **arguments, **outputs)
    if shares is not None:
        dalpha = shares.total()
    if work.hub_rows.numel():
        pieces = work.piece_begin.numel()
        partial_dk = empty(pieces, h, d_k, dtype=q.dtype)
        partial = empty(pieces, d, dtype=q.dtype)
        kernel = _column_kernel(*shape, **switches, needs_dalpha=False, pieces=True)
        outputs = {"dk": partial_dk, "partial": partial}
        kernel(work, pieces=True, scratch=scratch, **arguments, **outputs)
        if dk is not None:
            dk[work.hub_rows] = sum_pieces(partial_dk, work)
        if dx is not None:
            assert df is not None and x is not None and alpha is not None
            finish_field_gradient(
                dx, dalpha, partial, work, df=df, x=x, alpha=alpha, df_scale=df_scale
            )
    return dx, dalpha
