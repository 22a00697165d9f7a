"""The group pass of the edge attention backward: Δ, and more (see `attention/backward.py`)."""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torch import Tensor

from grand_fast.kernels.cpu.attention.head_blocks import EdgeInputs, EdgeSpec, EdgeView
from grand_fast.kernels.cpu.attention.scores import RowBuffer, load_heads
from grand_fast.kernels.cpu.attention.weight_gradient import (
    StateGradient,
    add_dw,
    head_terms,
    own_state_rows,
    score_factor,
    state_tables,
    weight_gradient_of,
)
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
from grand_fast.kernels.cpu.rows import Compiled, Row, Shares, each_row, scratch_size, sum_pieces
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import Source, Upstream

_BUFFERS = 5  # at most: a ρ, t, the factor of du, φ, and the mean weights


@lru_cache(maxsize=256)
def _group_kernel(
    d: int,
    spec: EdgeSpec,
    *,
    source: Source,
    needs_dw: bool,
    needs_dalpha: bool,
    step: Literal["whole", "delta", "sums"],
) -> Compiled:
    """`whole` rows; or for pieces of long rows first their `delta`, then, Δ known, their `sums`."""
    weighting, h, d_k = spec.weighting, spec.h, spec.d_k
    view = spec.view(f"attention_bwd_group_{step}", weighting.normalize)
    k = view.kernel
    delta, scratch = k.matrix("delta"), k.matrix("scratch").row(k.thread)
    whole = step == "whole"
    sums_dx = source == "state" and view.rows == "sender" and step != "delta"
    needs_dtop = weighting.normalizer == "squareplus" and step != "delta"
    needs_dw = needs_dw and step != "delta"
    factor = score_factor(source, h)
    tables = view.weight_tables + state_tables(view, source, d)
    own_rows = [*view.own_rows, (delta, h)]
    if whole:
        own_rows += [(k.matrix(f"d{view.own_name}"), h * d_k)]
        own_rows += [(k.matrix("norm_beside_delta"), 2 * h)]
    own_rows += own_state_rows(view, source, d, stores_dx=sums_dx and whole)
    with each_row(k, pieces=not whole, own_rows=own_rows, own_edges=view.own_edges) as row:
        weight_gradient = weight_gradient_of(view, source, d, row)
        for group in view.groups:
            net_buffer, t_buffer, factor_buffer, phi_buffer, mean_buffer = (
                RowBuffer(scratch.at(k.number("buffer") * b), group, row) for b in range(_BUFFERS)
            )
            own, own_norm = load_heads(group, view.own.row(row.node)), view.own_norm(group, row)
            assert own_norm is not None
            sums, sum_a = k.variable(k.splat(0.0)), k.variable(k.splat(0.0))
            with k.loop(row.begin, row.end, group.edges) as e:
                block = view.block(group, row, e, tables)
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
                    place = mean_buffer.at(e)
                    place.store(mean + place.load() if group.first else mean)
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
                    add_dw(view, group, row, e, source, phi_buffer.at(e).load() * net)
            if needs_dtop:
                share = k.matrix("dtop").row(row.task)
                share.store(fma(total.value, group.of_heads(-factor), share.load()))
            _store_sums(view, row, head_terms(group, view.others, net_buffer))
        if sums_dx:
            df = k.matrix("df")
            terms = [Term(df, c, mean_buffer.splat()) for c in chunks(d, k.lanes)]
            for i in range(0, len(terms), MAX_ACCUMULATORS):
                part = terms[i : i + MAX_ACCUMULATORS]
                channels = [term.chunk for term in part]
                atg = weighted_sum(k, row, k.indices("col"), part)
                if whole:
                    store_field_gradient(k, row, channels, atg, df, needs_dalpha=needs_dalpha)
                else:
                    store_partial(k, "partial", row, channels, atg)
    return Compiled(k)


def _store_sums(view: EdgeView, row: Row, terms: list[Term]) -> None:
    """The gradient of the row's own vectors."""
    k = view.kernel
    for i in range(0, len(terms), MAX_ACCUMULATORS):
        part = terms[i : i + MAX_ACCUMULATORS]
        sums = weighted_sum(k, row, k.indices("col"), part)
        store_partial(k, f"d{view.own_name}", row, [term.chunk for term in part], sums)


class GroupGradients(NamedTuple):
    """norm [N, 2, H], delta [N, H]: side by side for the other pass; dtop: of squareplus."""

    norm: Tensor
    delta: Tensor
    dtop: Tensor | None
    dx: Tensor | None
    dalpha: Tensor | None


def group_pass(
    inputs: EdgeInputs,
    upstream: Upstream,
    *,
    norm: Tensor,
    csr: Csr,
    d_own: Tensor,
    dedge_weight: Tensor | None,
    needs_dalpha: bool,
) -> GroupGradients:
    """Over the view `csr`: write `d_own`, the gradient of its rows' vectors; and `dedge_weight`.

    `dedge_weight` is given if it is to be written here, hence on the view of A alone.
    """
    h, d_k, dtype = inputs.shape
    n, work = norm.shape[0], csr.work
    both = empty(n, 3, h, dtype=dtype)
    norm_beside_delta, delta = both[:, :2], both[:, 2]
    of_senders = inputs.weighting.normalize == "sender"
    name = "dk" if of_senders else "dq"
    sums_dx = of_senders and upstream.x is not None
    state = StateGradient(upstream, work, needs_dalpha=needs_dalpha) if sums_dx else None
    shape = (upstream.channels, inputs.spec(csr))
    switches: Any = {"source": upstream.source, "needs_dw": dedge_weight is not None}
    buffer = scratch_size(work.longest)
    arguments = inputs.arguments(csr) | upstream.arguments() | {"norm": norm, "buffer": buffer}
    if dedge_weight is not None:
        arguments["dedge_weight"] = dedge_weight
    scratch = _BUFFERS * buffer
    shares = _dtop_shares(inputs, work.turn.numel())
    outputs: dict[str, Any] = {"delta": delta, "norm_beside_delta": norm_beside_delta, name: d_own}
    outputs |= state.arguments() if state else {}
    outputs |= {"dtop": shares.tensor} if shares else {}
    kernel = _group_kernel(*shape, **switches, needs_dalpha=needs_dalpha, step="whole")
    kernel(work, pieces=False, scratch=scratch, **arguments, **outputs)
    dtop = None if shares is None else shares.total().sum()
    if work.hub_rows.numel():
        pieces = work.piece_begin.numel()
        partial_delta, partial_a = (empty(pieces, h, dtype=dtype) for _ in range(2))
        outputs = {"delta": partial_delta, "sum_a": partial_a}
        kernel = _group_kernel(*shape, **switches, needs_dalpha=False, step="delta")
        kernel(work, pieces=True, scratch=scratch, **arguments, **outputs)
        norm_beside_delta[work.hub_rows] = norm[work.hub_rows]
        delta[work.hub_rows] = sum_pieces(partial_delta, work) / sum_pieces(partial_a, work)
        partial = empty(pieces, h, d_k, dtype=dtype)
        shares = _dtop_shares(inputs, pieces)
        outputs = {"delta": delta, name: partial}
        outputs |= state.piece_arguments() if state else {}
        outputs |= {"dtop": shares.tensor} if shares else {}
        kernel = _group_kernel(*shape, **switches, needs_dalpha=False, step="sums")
        kernel(work, pieces=True, scratch=scratch, **arguments, **outputs)
        d_own[work.hub_rows] = sum_pieces(partial, work)
        if dtop is not None and shares is not None:
            dtop = dtop + shares.total().sum()
    if state is None:
        return GroupGradients(norm_beside_delta, delta, dtop, None, None)
    state.finish()
    return GroupGradients(norm_beside_delta, delta, dtop, state.dx, state.dalpha)


def _dtop_shares(inputs: EdgeInputs, tasks: int) -> Shares | None:
    lanes = REGISTER_BYTES // inputs.q.element_size()
    is_needed = inputs.weighting.normalizer == "squareplus"
    return Shares(tasks, lanes, inputs.q.dtype) if is_needed else None
