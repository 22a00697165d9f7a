"""The pass of the edge attention's backward over the other view (see `cpu/attention/backward.py`).

Also the only one where a diffusion needs nothing but `dx`.
"""

from functools import lru_cache, partial

from torch import Tensor

from grand_fast.kernels.cpu.attention.backward_results import Results
from grand_fast.kernels.cpu.attention.head_blocks import EdgeSpec, Side
from grand_fast.kernels.cpu.attention.normalizer import EdgeInputs
from grand_fast.kernels.cpu.attention.scores import RowBuffer, load_heads
from grand_fast.kernels.cpu.attention.weight_gradient import (
    UpstreamSpec,
    add_dw,
    head_chunks,
    weight_gradient_of,
)
from grand_fast.kernels.cpu.attention.weighted_sum import head_terms, store_products
from grand_fast.kernels.cpu.gathered_sums import (
    MAX_ACCUMULATORS,
    Term,
    accumulate,
    store_field_gradient,
    store_partial,
    stretches,
)
from grand_fast.kernels.cpu.language import chunks
from grand_fast.kernels.cpu.rows import Compiled, each_row, scratch_size
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import Upstream

_STRETCH_EDGES = 32  # the rows that this pass reads twice stay in the nearest cache


@lru_cache(maxsize=256)
def _other_kernel(
    upstream: UpstreamSpec, spec: EdgeSpec, *, rows: Side, writes: frozenset[str], pieces: bool
) -> Compiled:
    view = spec.view("attention_bwd_other", rows)
    k, h, d_k, d = view.kernel, spec.h, spec.d_k, upstream.d
    scratch, buffer = k.matrix("scratch").row(k.thread), k.number("buffer")
    d_own_name = f"d{view.own_name}"
    needs_d_own, sums_dx, sums_dv = (name in writes for name in (d_own_name, "dx", "dv"))
    factor = upstream.factor(h)
    tables = view.weight_tables + upstream.far_tables(view)
    edge_tables = upstream.edge_tables(view) if needs_d_own else []
    values = [upstream.values(view, group) for group in view.groups]
    channels = chunks(d, k.lanes) if sums_dx else head_chunks(values) if sums_dv else []
    heads = head_chunks(view.groups) if needs_d_own else []
    own_rows = view.own_rows
    if needs_d_own:
        own_rows += [(k.matrix(d_own_name), h * d_k)]
    stored = [name for name in ("dx", "dv") if name in writes and not pieces]
    own_rows += upstream.own_rows(view, *stored)
    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=view.own_edges) as row:
        weight_gradient = weight_gradient_of(view, upstream, row)
        own_vectors = [load_heads(group, view.own.row(row.node)) for group in view.groups]
        own_norms = [view.own_norm(group, row) for group in view.groups]
        d_own = [k.variable(k.splat(0.0)) for _ in heads]
        atg = [k.variable(k.splat(0.0)) for _ in channels]
        with stretches(k, row, _STRETCH_EDGES) as part:
            terms: list[Term] = []
            value_terms: list[Term] = []
            for number, group in enumerate(view.groups):
                mean_buffer = RowBuffer(scratch, group, part)
                du_buffer = RowBuffer(scratch.at(buffer * (number + 1)), group, part)
                a_buffer = RowBuffer(scratch.at(buffer * (number + 1 + h)), group, part)
                with k.loop(part.begin, part.end, group.edges) as e:
                    block = view.block(group, part, e, tables, edge_tables)
                    scores = view.scores(group, own_vectors[number], block)
                    a, a_rho = view.weights(group, block, scores.s, own_norms[number])
                    if needs_d_own:
                        t = weight_gradient(group, block)
                        delta = group.load([k.matrix("delta").row(i) for i in block.nodes])
                        du_factor = k.splat(spec.weighting.scale * factor)
                        if view.varies:
                            du_factor = scores.du_factor * k.splat(factor)
                        du_buffer.at(e).store(a_rho * du_factor * (t - delta))
                        if "dedge_weight" in writes:
                            dw = scores.phi * a_rho * (t - delta)
                            add_dw(view, group, part, e, factor, dw)
                    if sums_dx:
                        mean = group.over_heads(a * group.of_heads(1.0 / h))
                        place = mean_buffer.at(e)
                        place.store(mean + place.load() if number else mean)
                    if sums_dv or "dedge_value" in writes:
                        a_buffer.at(e).store(a * k.splat(factor))
                if needs_d_own:
                    added = view.edge_key if rows == "receiver" else None
                    terms += head_terms(group, view.others, du_buffer.at, added=added)
                if "dedge_key" in writes:
                    of_edges = head_terms(group, view.own, du_buffer.at, end="own")
                    store_products(view, part, of_edges, "dedge_key")
                if sums_dv:
                    value_terms += head_terms(values[number], k.matrix("df"), a_buffer.at)
                if "dedge_value" in writes:
                    of_edges = head_terms(values[number], k.matrix("df"), a_buffer.at, end="own")
                    store_products(view, part, of_edges, "dedge_value")
            if sums_dx:
                terms += [Term(k.matrix("df"), c, mean_buffer.splat()) for c in channels]
            terms += value_terms
            totals = d_own + atg
            for i in range(0, len(terms), MAX_ACCUMULATORS):
                j = i + MAX_ACCUMULATORS
                accumulate(k, part, k.indices("col"), terms[i:j], totals[i:j])
        if needs_d_own:
            sums = [total.value for total in d_own]
            store_partial(k, d_own_name, row, heads, sums)
        if sums_dx:
            sums = [total.value for total in atg]
            if pieces:
                store_partial(k, "partial", row, channels, sums)
            else:
                df = k.matrix("df")
                store_field_gradient(k, row, channels, sums, df, needs_dalpha="dalpha" in writes)
        if sums_dv:
            store_partial(k, "dv", row, channels, [total.value for total in atg])
    return Compiled(k)


def other_pass(
    inputs: EdgeInputs,
    upstream: Upstream,
    results: Results,
    *,
    norm: Tensor,
    delta: Tensor | None,
    csr: Csr,
) -> dict[str, Tensor]:
    """Over the view `csr`: the `results`; with Δ if they are by vectors or edges."""
    h, work = inputs.shape[0], csr.work
    rows: Side = "receiver" if csr.slot is None else "sender"
    kernel = partial(_other_kernel, UpstreamSpec.of(upstream), inputs.spec(csr), rows=rows)
    buffer = scratch_size(_STRETCH_EDGES)
    scratch = buffer * (1 + 2 * h)  # the mean weights; of each group of heads du, and the weights
    arguments = inputs.arguments(csr) | upstream.arguments() | {"norm": norm, "buffer": buffer}
    if delta is not None:
        arguments["delta"] = delta
    whole, outputs = results.names, results.arguments()
    kernel(writes=whole, pieces=False)(work, pieces=False, scratch=scratch, **arguments, **outputs)
    if work.hub_rows.numel():
        writes, outputs = whole - {"dalpha"}, results.piece_arguments(work)
        compiled = kernel(writes=writes, pieces=True)
        compiled(work, pieces=True, scratch=scratch, **arguments, **outputs)
    return results.finish(work)
