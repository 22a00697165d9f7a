"""Backward of the edge attention: gradients by q and k, and by the values of a diffusion.

With t[e,h] the gradient by the weight a[e,h] and Δ[i,h] = Σ_{e in row i} a[e,h] t[e,h]:
ds[e,h] = a[e,h] · (t[e,h] − Δ[i,h]) / √d_k,  dq[i,h] = Σ_e ds[e,h] k[col[e],h],  dk likewise.

Row pass:    on the CSR of A; recomputes a from lse, gives Δ and dq.
Column pass: on the CSR of Aᵀ; recomputes a from lse, gives dk and, for a diffusion, dx.
t comes from `da`, or in a diffusion from the state: t[e,h] = <alpha · df[i], x[col[e]]> / H.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from grand_fast.kernels._cpu import Compiled, Row, Shares, each_row, sum_pieces
from grand_fast.kernels._csr import Csr
from grand_fast.kernels._diffusion import (
    MAX_ACCUMULATORS,
    Term,
    accumulate,
    finish_field_gradient,
    store_field_gradient,
    store_partial,
    stretches,
    weighted_sum,
)
from grand_fast.kernels._edge_scores import (
    HeadGroup,
    RowBuffer,
    block_scores,
    block_slots,
    buffer_size,
    head_groups,
    load_heads,
    prefetch_block,
)
from grand_fast.kernels._memory import empty
from grand_fast.kernels._simd import Int, Kernel, Matrix, Vec, chunks
from grand_fast.kernels._simd_math import add, butterfly, exp, fma, transposed_sum

# Whence the gradient by the weights: the state, `da [E, H]`, or `da [E]` by the mean over heads.
Source = Literal["state", "heads", "mean"]
_COLUMN_EDGES = 32  # the rows that the column pass reads twice stay in the nearest cache
_KernelShape = tuple[int, int, int, torch.dtype, torch.dtype]  # d, H, d_k, dtype, index


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
        weight_gradient = _weight_gradient(k, source, d, h, row, own="df", others="x")
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
                p_buffer.at(e).store(_score_gradient(group, source, h, p, t, row_delta))
            terms = _head_terms(group, key, p_buffer)
            for i in range(0, len(terms), MAX_ACCUMULATORS):
                block = terms[i : i + MAX_ACCUMULATORS]
                dq = weighted_sum(k, row, col, block)
                store_partial(k, "dq", row, [term.chunk for term in block], dq)
    return Compiled(k)


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
        weight_gradient = _weight_gradient(k, source, d, h, row, own="x", others="df")
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
                        ds_buffer.at(e).store(_score_gradient(group, source, h, p, t, delta))
                    if has_state:
                        w = group.over_heads(p * group.of_heads(1.0 / h))
                        w_buffer.at(e).store(w + w_buffer.at(e).load() if number else w)
                if needs_dk:
                    terms += _head_terms(group, q, ds_buffer)
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


def _ready(vec: Vec) -> Callable[[], Vec]:
    return lambda: vec


def _weight_gradient(
    k: Kernel, source: Source, d: int, h: int, row: Row, *, own: str, others: str
) -> Callable[[HeadGroup, Sequence[Int], Sequence[Int]], Vec]:
    """Writes `t` of a block, given its slots in this view and the nodes at its far ends.

    From the state: the product of alpha · own[row] and others[node], not yet divided by H.
    """
    if source == "state":
        alpha, row_own = k.vector("alpha"), k.matrix(own).row(row.node)
        channels = chunks(d, k.lanes)

        def from_state(group: HeadGroup, slots: Sequence[Int], nodes: Sequence[Int]) -> Vec:
            rows = [k.matrix(others).row(node) for node in nodes]
            totals = [k.splat(0.0) for _ in rows]
            for c in channels:
                # Read anew for each block: the scores need the registers.
                own_c = alpha.at(c.start).load(c.lanes) * row_own.at(c.start).load(c.lanes)
                totals = [
                    fma(own_c, other.at(c.start).load(c.lanes), total)
                    for other, total in zip(rows, totals, strict=True)
                ]
            return transposed_sum([_ready(total) for total in totals], k.lanes)

        return from_state

    da = k.vector("da")

    def in_a(slot: Int) -> Int:
        # Row pass: A's own slots are a shift away. Column pass: `slot` leads from Aᵀ to A.
        return slot + row.shift if own == "df" else k.indices("slot")[slot]

    def from_heads(group: HeadGroup, slots: Sequence[Int], nodes: Sequence[Int]) -> Vec:
        rows = [da.at(in_a(slot) * h) for slot in slots]
        if len(rows) == 1:
            return rows[0].at(group.first).load_into(k.splat(0.0), 0, group.count)
        return group.load(rows)

    def from_mean(group: HeadGroup, slots: Sequence[Int], nodes: Sequence[Int]) -> Vec:
        vec = k.splat(0.0)
        for z, slot in enumerate(slots):
            vec = da.at(in_a(slot)).load_into(vec, z * group.width, 1)
        return butterfly(vec, add, 1, group.width)

    return from_heads if source == "heads" else from_mean


def _score_gradient(group: HeadGroup, source: Source, h: int, p: Vec, t: Vec, delta: Vec) -> Vec:
    """`ds`, with the 1/H of a mean over heads, which `t` and `delta` leave out."""
    heads = 1 if source == "heads" else h
    factor = group.kernel.splat(1.0 / (heads * math.sqrt(group.d_k)))
    return p * factor * (t - delta)


def _head_terms(group: HeadGroup, table: Matrix, ds: RowBuffer) -> list[Term]:
    """`Σ_e ds[e,h] · table[col[e],h]` for the heads of the group."""
    return [
        Term(table, c, weight)
        for i, weight in enumerate(ds.splat(lane) for lane in range(group.count))
        for c in group.channels(i)
    ]


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
    source, d = _source(x, da)
    work, shape = csr.work, (d, h, d_k, q.dtype, csr.col.dtype)
    lse_beside_delta, delta = empty(n, 2, h, dtype=q.dtype).unbind(1)
    buffer = buffer_size(work.longest)
    arguments: dict[str, Any] = {"q": q, "k": k, "lse": lse, "buffer": buffer} | _given(
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
    source, d = _source(x, da)
    work, shape = csr_t.work, (d, h, d_k, q.dtype, csr_t.col.dtype)
    buffer = buffer_size(_COLUMN_EDGES)
    scratch = buffer * (1 + h)  # the mean weights, and ds of each group of heads
    arguments: dict[str, Any] = {"q": q, "k": k, "lse": lse, "buffer": buffer} | _given(
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
        arguments["df_scale"] = torch.tensor([df_scale], dtype=q.dtype)
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


def _source(x: Tensor | None, da: Tensor | None) -> tuple[Source, int]:
    if da is None:
        assert x is not None
        return "state", x.shape[1]
    return ("mean" if da.dim() == 1 else "heads"), 0


def _given(
    df: Tensor | None, x: Tensor | None, alpha: Tensor | None, da: Tensor | None
) -> dict[str, Tensor]:
    named = {"df": df, "x": x, "alpha": alpha, "da": da}
    return {name: value for name, value in named.items() if value is not None}
