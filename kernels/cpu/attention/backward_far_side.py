"""The pass of the edge attention's backward over the other view (see `cpu/attention/backward.py`).

Also the only one where a diffusion needs nothing but `dx`.
"""

from functools import lru_cache
from typing import Any

from torch import Tensor

from grand_fast.kernels.cpu.attention.head_blocks import EdgeInputs, EdgeSpec, Side
from grand_fast.kernels.cpu.attention.scores import RowBuffer, load_heads
from grand_fast.kernels.cpu.attention.weight_gradient import (
    StateGradient,
    add_dw,
    head_chunks,
    head_terms,
    own_state_rows,
    score_factor,
    state_tables,
    weight_gradient_of,
)
from grand_fast.kernels.cpu.gathered_sums import (
    MAX_ACCUMULATORS,
    Term,
    accumulate,
    store_field_gradient,
    store_partial,
    stretches,
)
from grand_fast.kernels.cpu.language import chunks
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, each_row, scratch_size, sum_pieces
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import Source, Upstream

_STRETCH_EDGES = 32  # the rows that this pass reads twice stay in the nearest cache


@lru_cache(maxsize=256)
def _other_kernel(
    d: int,
    spec: EdgeSpec,
    *,
    rows: Side,
    source: Source,
    needs_d_own: bool,
    needs_dw: bool,
    needs_dalpha: bool,
    pieces: bool,
) -> Compiled:
    view = spec.view("attention_bwd_other", rows)
    k, h, d_k = view.kernel, spec.h, spec.d_k
    scratch, buffer = k.matrix("scratch").row(k.thread), k.number("buffer")
    sums_dx = source == "state" and rows == "sender"
    factor = score_factor(source, h)
    tables = view.weight_tables + state_tables(view, source, d)
    channels = chunks(d, k.lanes) if sums_dx else []
    heads = head_chunks(view) if needs_d_own else []
    own_rows = view.own_rows
    if needs_d_own:
        own_rows += [(k.matrix(f"d{view.own_name}"), h * d_k)]
    own_rows += own_state_rows(view, source, d, stores_dx=sums_dx and not pieces)
    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=view.own_edges) as row:
        weight_gradient = weight_gradient_of(view, source, d, row)
        own_vectors = [load_heads(group, view.own.row(row.node)) for group in view.groups]
        own_norms = [view.own_norm(group, row) for group in view.groups]
        d_own = [k.variable(k.splat(0.0)) for _ in heads]
        atg = [k.variable(k.splat(0.0)) for _ in channels]
        with stretches(k, row, _STRETCH_EDGES) as part:
            terms: list[Term] = []
            for number, group in enumerate(view.groups):
                mean_buffer = RowBuffer(scratch, group, part)
                du_buffer = RowBuffer(scratch.at(buffer * (number + 1)), group, part)
                with k.loop(part.begin, part.end, group.edges) as e:
                    block = view.block(group, part, e, tables)
                    scores = view.scores(group, own_vectors[number], block)
                    a, a_rho = view.weights(group, block, scores.s, own_norms[number])
                    if needs_d_own:
                        t = weight_gradient(group, block)
                        delta = group.load([k.matrix("delta").row(i) for i in block.nodes])
                        du_factor = k.splat(spec.weighting.scale * factor)
                        if view.varies:
                            du_factor = scores.du_factor * k.splat(factor)
                        du_buffer.at(e).store(a_rho * du_factor * (t - delta))
                        if needs_dw:
                            dw = scores.phi * a_rho * (t - delta)
                            add_dw(view, group, part, e, source, dw)
                    if sums_dx:
                        mean = group.over_heads(a * group.of_heads(1.0 / h))
                        place = mean_buffer.at(e)
                        place.store(mean + place.load() if number else mean)
                if needs_d_own:
                    terms += head_terms(group, view.others, du_buffer)
            if sums_dx:
                terms += [Term(k.matrix("df"), c, mean_buffer.splat()) for c in channels]
            totals = d_own + atg
            for i in range(0, len(terms), MAX_ACCUMULATORS):
                j = i + MAX_ACCUMULATORS
                accumulate(k, part, k.indices("col"), terms[i:j], totals[i:j])
        if needs_d_own:
            sums = [total.value for total in d_own]
            store_partial(k, f"d{view.own_name}", row, heads, sums)
        if sums_dx:
            sums = [total.value for total in atg]
            if pieces:
                store_partial(k, "partial", row, channels, sums)
            else:
                df = k.matrix("df")
                store_field_gradient(k, row, channels, sums, df, needs_dalpha=needs_dalpha)
    return Compiled(k)


def other_pass(
    inputs: EdgeInputs,
    upstream: Upstream,
    *,
    norm: Tensor,
    delta: Tensor | None,
    csr: Csr,
    d_own: Tensor | None,
    dedge_weight: Tensor | None,
    needs_dalpha: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Over the view `csr`: write `d_own`, the gradient of its rows' vectors, with Δ, if given.

    Writes `dedge_weight` if given, on the view of A alone. Returns `dx` and, if needed, `dalpha` of
    a diffusion, on the view of Aᵀ alone.
    """
    h, d_k, dtype = inputs.shape
    work = csr.work
    rows: Side = "receiver" if csr.slot is None else "sender"
    name = "dq" if rows == "receiver" else "dk"
    sums_dx = rows == "sender" and upstream.x is not None
    state = StateGradient(upstream, work, needs_dalpha=needs_dalpha) if sums_dx else None
    shape = (upstream.channels, inputs.spec(csr))
    switches: dict[str, Any] = {"rows": rows, "source": upstream.source}
    switches |= {"needs_d_own": d_own is not None, "needs_dw": dedge_weight is not None}
    buffer = scratch_size(_STRETCH_EDGES)
    scratch = buffer * (1 + h)  # the mean weights, and du of each group of heads
    arguments = inputs.arguments(csr) | upstream.arguments() | {"norm": norm, "buffer": buffer}
    if d_own is not None:
        arguments["delta"] = delta
    if dedge_weight is not None:
        arguments["dedge_weight"] = dedge_weight
    outputs: dict[str, Any] = {name: d_own}
    if state is not None:
        outputs |= state.arguments()
    kernel = _other_kernel(*shape, **switches, needs_dalpha=needs_dalpha, pieces=False)
    kernel(work, pieces=False, scratch=scratch, **arguments, **outputs)
    if work.hub_rows.numel():
        partial = empty(work.piece_begin.numel(), h, d_k, dtype=dtype)
        outputs = {name: partial}
        if state is not None:
            outputs |= state.piece_arguments()
        kernel = _other_kernel(*shape, **switches, needs_dalpha=False, pieces=True)
        kernel(work, pieces=True, scratch=scratch, **arguments, **outputs)
        if d_own is not None:
            d_own[work.hub_rows] = sum_pieces(partial, work)
    if state is None:
        return None, None
    state.finish()
    return state.dx, state.dalpha
