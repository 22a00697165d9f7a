"""The group pass of the edge attention backward: Δ, and more (see `attention/backward.py`)."""

from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from grand_fast.kernels.cpu.attention.backward_results import Results
from grand_fast.kernels.cpu.attention.head_blocks import EdgeSpec
from grand_fast.kernels.cpu.attention.normalizer import EdgeInputs
from grand_fast.kernels.cpu.attention.scores import RowBuffer, load_heads
from grand_fast.kernels.cpu.attention.weight_gradient import (
    UpstreamSpec,
    add_dw,
    weight_gradient_of,
)
from grand_fast.kernels.cpu.attention.weighted_sum import head_terms, store_products, sums_of
from grand_fast.kernels.cpu.gathered_sums import (
    MAX_ACCUMULATORS,
    Term,
    store_field_gradient,
    store_partial,
    weighted_sum,
)
from grand_fast.kernels.cpu.language import REGISTER_BYTES, chunks
from grand_fast.kernels.cpu.math import fma, where_positive
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, Shares, each_row, scratch_size, sum_pieces
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import Upstream

_BUFFERS = 5  # at most: a ρ, t, the factor of du, φ, and the weights


@lru_cache(maxsize=256)
def _group_kernel(
    upstream: UpstreamSpec,
    spec: EdgeSpec,
    *,
    writes: frozenset[str],
    step: Literal["whole", "delta", "sums"],
) -> Compiled:
    """`whole` rows; or for pieces of long rows first their `delta`, then, Δ known, their `sums`."""
    weighting, h, d_k, d = spec.weighting, spec.h, spec.d_k, upstream.d
    view = spec.view(f"attention_bwd_group_{step}", weighting.normalize)
    k = view.kernel
    delta, scratch = k.matrix("delta"), k.matrix("scratch").row(k.thread)
    whole, own_name = step == "whole", f"d{view.own_name}"
    sums_dx, sums_dv, needs_dw, needs_of_values = (
        name in writes for name in ("dx", "dv", "dedge_weight", "dedge_value")
    )
    needs_dtop = weighting.normalizer == "squareplus" and step != "delta"
    factor = upstream.factor(h)
    tables = view.weight_tables + upstream.far_tables(view)
    own_rows = [*view.own_rows, (delta, h)]
    if whole:
        own_rows += [(k.matrix(own_name), h * d_k)]
        own_rows += [(k.matrix("norm_beside_delta"), 2 * h)]
    stored = [name for name in ("dx", "dv") if name in writes and whole]
    own_rows += upstream.own_rows(view, *stored)
    with each_row(k, pieces=not whole, own_rows=own_rows, own_edges=view.own_edges) as row:
        weight_gradient = weight_gradient_of(view, upstream, row)
        for group in view.groups:
            net_buffer, t_buffer, factor_buffer, phi_buffer, a_buffer = (
                RowBuffer(scratch.at(k.number("buffer") * b), group, row) for b in range(_BUFFERS)
            )
            own, own_norm = load_heads(group, view.own.row(row.node)), view.own_norm(group, row)
            assert own_norm is not None
            sums, sum_a = k.variable(k.splat(0.0)), k.variable(k.splat(0.0))
            with k.loop(row.begin, row.end, group.edges) as e:
                block = view.block(group, row, e, tables, upstream.edge_tables(view))
                scores = view.scores(group, own, block)
                a, a_rho = view.weights(group, block, scores.s, own_norm)
                t = weight_gradient(group, block)
                sums.value = fma(a, t, sums.value)
                sum_a.value = sum_a.value + a
                net_buffer.at(e).store(a_rho)
                t_buffer.at(e).store(t)
                if view.varies:
                    factor_buffer.at(e).store(scores.du_factor * k.splat(factor))
                if needs_dw:
                    phi_buffer.at(e).store(scores.phi)
                if sums_dx:
                    mean = group.over_heads(a * group.of_heads(1.0 / h))
                    place = a_buffer.at(e)
                    place.store(mean + place.load() if group.first else mean)
                if sums_dv or needs_of_values:
                    a_buffer.at(e).store(a * k.splat(factor))
            if step == "sums":
                row_delta = group.load([delta.row(row.node)])
            else:
                # Σ a is 1 but for roundings, and Σ ds, 0 by rights, would be wrong by as much.
                row_delta, total_a = group.over_edges(sums.value), group.over_edges(sum_a.value)
                if whole:
                    row_delta = row_delta / where_positive(total_a, total_a, k.splat(1.0))
                else:
                    group.store(k.matrix("sum_a").row(row.out), total_a)
                group.store(delta.row(row.out), row_delta)
            if whole:
                view.store_norm(group, k.matrix("norm_beside_delta").row(row.node), own_norm)
            if step == "delta":
                continue
            total = k.variable(k.splat(0.0))
            with k.loop(row.begin, row.end, group.edges) as e:
                a_rho, t = net_buffer.at(e).load(), t_buffer.at(e).load()
                du_factor = k.splat(weighting.scale * factor)
                if view.varies:
                    du_factor = factor_buffer.at(e).load()
                net_buffer.at(e).store(a_rho * du_factor * (t - row_delta))
                net = a_rho * (t - row_delta)
                if needs_dtop:
                    total.value = total.value + net
                if needs_dw:
                    add_dw(view, group, row, e, factor, phi_buffer.at(e).load() * net)
            if needs_dtop:
                share = k.matrix("dtop").row(row.task)
                share.store(fma(total.value, group.of_heads(-factor), share.load()))
            added = view.edge_key if view.rows == "receiver" else None
            sums_of_rows = {own_name: head_terms(group, view.others, net_buffer.at, added=added)}
            if "dedge_key" in writes:
                terms = head_terms(group, view.own, net_buffer.at, end="own")
                store_products(view, row, terms, "dedge_key")
            values = upstream.values(view, group)
            if needs_of_values:
                terms = head_terms(values, k.matrix("df"), a_buffer.at, end="own")
                store_products(view, row, terms, "dedge_value")
            if sums_dv:
                sums_of_rows["dv"] = head_terms(values, k.matrix("df"), a_buffer.at)
            for name, terms in sums_of_rows.items():
                for sum_, c in sums_of(k, row, terms):
                    k.matrix(name).row(row.out).at(c.start).store(sum_, c.lanes)
        if sums_dx:
            df = k.matrix("df")
            terms = [Term(df, c, a_buffer.splat()) for c in chunks(d, k.lanes)]
            for i in range(0, len(terms), MAX_ACCUMULATORS):
                part = terms[i : i + MAX_ACCUMULATORS]
                channels = [term.chunk for term in part]
                atg = weighted_sum(k, row, k.indices("col"), part)
                if whole:
                    store_field_gradient(k, row, channels, atg, df, needs_dalpha="dalpha" in writes)
                else:
                    store_partial(k, "partial", row, channels, atg)
    return Compiled(k)


class GroupGradients(NamedTuple):
    """norm [N, 2, H], delta [N, H]: side by side for the other pass; dtop: of squareplus.

    found: what the pass was to write.
    """

    norm: Tensor
    delta: Tensor
    dtop: Tensor | None
    found: dict[str, Tensor]


def group_pass(
    inputs: EdgeInputs, upstream: Upstream, results: Results, *, norm: Tensor, csr: Csr
) -> GroupGradients:
    """Over the view `csr`: the `results`, and what the other pass needs."""
    h, _, dtype = inputs.shape
    n, work, writes = norm.shape[0], csr.work, results.names
    both = empty(n, 3, h, dtype=dtype)
    norm_beside_delta, delta = both[:, :2], both[:, 2]
    kernel = partial(_group_kernel, UpstreamSpec.of(upstream), inputs.spec(csr))
    buffer = scratch_size(work.longest)
    arguments = inputs.arguments(csr) | upstream.arguments() | {"norm": norm, "buffer": buffer}
    scratch = _BUFFERS * buffer
    shares = _dtop_shares(inputs, work.turn.numel())
    outputs: dict[str, Any] = {"delta": delta, "norm_beside_delta": norm_beside_delta}
    outputs |= results.arguments()
    outputs |= {"dtop": shares.tensor} if shares else {}
    whole = kernel(writes=writes, step="whole")
    whole(work, pieces=False, scratch=scratch, **arguments, **outputs)
    dtop = None if shares is None else shares.total().sum()
    if work.hub_rows.numel():
        pieces = work.piece_begin.numel()
        partial_delta, partial_a = (empty(pieces, h, dtype=dtype) for _ in range(2))
        outputs = {"delta": partial_delta, "sum_a": partial_a}
        of_delta = kernel(writes=frozenset(), step="delta")
        of_delta(work, pieces=True, scratch=scratch, **arguments, **outputs)
        norm_beside_delta[work.hub_rows] = norm[work.hub_rows]
        delta[work.hub_rows] = sum_pieces(partial_delta, work) / sum_pieces(partial_a, work)
        shares = _dtop_shares(inputs, pieces)
        outputs = {"delta": delta} | results.piece_arguments(work)
        outputs |= {"dtop": shares.tensor} if shares else {}
        of_sums = kernel(writes=writes - {"dalpha"}, step="sums")
        of_sums(work, pieces=True, scratch=scratch, **arguments, **outputs)
        if dtop is not None and shares is not None:
            dtop = dtop + shares.total().sum()
    return GroupGradients(norm_beside_delta, delta, dtop, results.finish(work))


def _dtop_shares(inputs: EdgeInputs, tasks: int) -> Shares | None:
    lanes = REGISTER_BYTES // inputs.q.element_size()
    is_needed = inputs.weighting.normalizer == "squareplus"
    return Shares(tasks, lanes, inputs.q.dtype) if is_needed else None
