"""What weights are made of, and the passes of forward that know no normaliser yet.

These find it, or the largest score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grand_fast.kernels.cpu.attention.head_blocks import EdgeSpec, EdgeView, Norm, Side
from grand_fast.kernels.cpu.attention.scores import HeadGroup, RowBuffer, load_heads
from grand_fast.kernels.cpu.gathered_sums import stretches
from grand_fast.kernels.cpu.language import Matrix, Vec
from grand_fast.kernels.cpu.math import maximum
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, Row, Work, each_row, scratch_size, sum_pieces
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import Weighting

SUM_EDGES = 512  # summed on their own first, as SUM_EDGES in `cpu/gathered_sums.py`


@dataclass(frozen=True)
class EdgeInputs:
    """What the weights of all edges depend on beside the graph; arguments as in the reference."""

    q: Tensor
    k: Tensor
    weighting: Weighting
    edge_weight: Tensor | None
    top: Tensor | None
    edge_key: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, torch.dtype]:
        """H, d_k and the dtype."""
        return (*self.q.shape[1:], self.q.dtype)

    def spec(self, csr: Csr) -> EdgeSpec:
        """What kernels are compiled for, for a pass over the view `csr`."""
        given = self.edge_weight is not None, self.edge_key is not None
        return EdgeSpec(*self.shape, csr.col.dtype, self.weighting, *given)

    def arguments(self, csr: Csr) -> dict[str, Any]:
        """What kernels are given, for a pass over the view `csr`."""
        named: dict[str, Any] = {"q": self.q, "k": self.k, "col": csr.col, "rowptr": csr.rowptr}
        named |= {"last_edge": csr.col.numel() - 1}
        top = None if self.top is None else self.top.to(self.q.dtype)
        given = {"slot": csr.slot, "edge_weight": self.edge_weight, "top": top}
        given |= {"edge_key": self.edge_key}
        return named | {name: value for name, value in given.items() if value is not None}


def forward_rows(view: EdgeView, *, known: bool) -> list[tuple[Matrix, int]]:
    """Tables of which `row_weights` reads or writes a row's own row."""
    if known:
        return view.own_rows
    return [(view.own, view.h * view.d_k), (view.kernel.matrix("norm"), 2 * view.h)]


def row_weights(
    view: EdgeView, group: HeadGroup, row: Row, buffer: RowBuffer, *, known: bool
) -> Vec:
    """Weights of the row's edges → buffer, up to a factor for each head, which is returned.

    `known`: what normalises them is; else it is found, and `norm` written.
    """
    if not known:
        return _normalise(view, group, row, buffer)
    own = load_heads(group, view.own.row(row.node))
    own_norm = view.own_norm(group, row)
    with view.kernel.loop(row.begin, row.end, group.edges) as e:
        block = view.block(group, row, e, view.weight_tables)
        s = view.scores(group, own, block).s
        buffer.at(e).store(view.weights(group, block, s, own_norm)[0])
    return view.kernel.splat(1.0)


def _normalise(view: EdgeView, group: HeadGroup, row: Row, buffer: RowBuffer) -> Vec:
    """`p` of the row's edges → buffer, what normalises them → `norm`; returns 1 / Σ p."""
    k = view.kernel
    largest = _largest_score(view, group, row, buffer)
    total = _unnormalised(view, group, row, largest, buffer)
    inverse = k.splat(1.0) / total  # infinite, but never read, in a row without edges
    shift = largest if view.weighting.normalizer == "softmax" else None
    view.store_norm(group, k.matrix("norm").row(row.out), Norm(shift, inverse))
    return inverse


def _largest_score(view: EdgeView, group: HeadGroup, row: Row, buffer: RowBuffer | None) -> Vec:
    """Scores of the row's edges → buffer; returns each head's largest, in all its lanes."""
    k = view.kernel
    lowest = k.splat(-math.inf)
    top = k.variable(lowest)
    own = load_heads(group, view.own.row(row.node))
    with k.loop(row.begin, row.end, group.edges) as e:
        block = view.block(group, row, e, view.score_tables)
        s = view.scores(group, own, block).s
        s = s.first((row.end - e) * group.width, lowest)
        if buffer is not None:
            buffer.at(e).store(s)
        top.value = maximum(s, top.value)
    return group.over_edges(top.value, maximum)


def _unnormalised(
    view: EdgeView, group: HeadGroup, row: Row, largest: Vec, buffer: RowBuffer
) -> Vec:
    """Scores in the buffer → `p`; returns each head's sum, in all its lanes."""
    k = view.kernel
    total = k.variable(k.splat(0.0))
    with stretches(k, row, SUM_EDGES) as part:
        partial = k.variable(k.splat(0.0))
        with k.loop(part.begin, part.end, group.edges) as e:
            p = view.unnormalised(buffer.at(e).load(), largest)
            buffer.at(e).store(p)
            partial.value = partial.value + p
        total.value = total.value + partial.value
    return group.over_edges(total.value)


@lru_cache(maxsize=256)
def _norm_kernel(spec: EdgeSpec, *, rows: Side, pieces: bool) -> Compiled:
    view = spec.view("edge_attention_norm", rows)
    k = view.kernel
    scratch, own_rows = k.matrix("scratch").row(k.thread), forward_rows(view, known=False)
    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=view.own_edges) as row:
        for group in view.groups:
            _normalise(view, group, row, RowBuffer(scratch, group, row))
    return Compiled(k)


def find_norm(inputs: EdgeInputs, csr_t: Csr | None) -> Tensor:
    """What normalises the edges of all senders, `[N, 2, H]`."""
    assert csr_t is not None
    n, h, _ = inputs.q.shape
    norm = empty(n, 2, h, dtype=inputs.q.dtype)
    kernel = _norm_kernel(inputs.spec(csr_t), rows="sender", pieces=False)
    arguments = inputs.arguments(csr_t) | {"norm": norm}
    kernel(csr_t.work, pieces=False, scratch=scratch_size(csr_t.work.longest), **arguments)
    find_hub_norm(inputs, csr_t, norm)
    return norm


def run_forward(
    inputs: EdgeInputs,
    csr: Csr,
    csr_t: Csr | None,
    kernel: Callable[..., Compiled],
    *,
    scratch: int,
    **arguments: Tensor | int,
) -> Tensor:
    """Run the forward kernels over the view of A, and on the pieces of long rows; returns `norm`.

    `kernel` says which they are, by `known`, as `row_weights` has it, and `pieces`.
    """
    n, h, _ = inputs.q.shape
    work, known = csr.work, inputs.weighting.normalize == "sender"
    norm = find_norm(inputs, csr_t) if known else empty(n, 2, h, dtype=inputs.q.dtype)
    arguments |= inputs.arguments(csr) | {"norm": norm}
    kernel(known=known, pieces=False)(work, pieces=False, scratch=scratch, **arguments)
    if work.hub_rows.numel():
        if not known:
            find_hub_norm(inputs, csr, norm)
        kernel(known=True, pieces=True)(work, pieces=True, scratch=scratch, **arguments)
    return norm


def find_hub_norm(inputs: EdgeInputs, csr: Csr, norm: Tensor) -> None:
    """Write that of those rows of the view that are cut into pieces."""
    work = csr.work
    if work.hub_rows.numel() == 0:
        return
    rows: Side = "receiver" if csr.slot is None else "sender"
    kernel = _norm_kernel(inputs.spec(csr), rows=rows, pieces=True)
    partial = empty(work.piece_begin.numel(), *norm.shape[1:], dtype=norm.dtype)
    arguments: dict[str, Any] = inputs.arguments(csr) | {"norm": partial}
    kernel(work, pieces=True, scratch=scratch_size(work.longest), **arguments)
    join_norm(norm, partial, work)


def join_norm(norm: Tensor, partial: Tensor, work: Work) -> None:
    """Write that of rows that are cut, from that of their pieces."""
    shift, inverse = partial.unbind(1)
    largest = _largest_of_hubs(shift.contiguous(), work)
    hub = torch.repeat_interleave(work.hub_pieces.diff())
    total = sum_pieces(torch.exp(shift - largest[hub]) / inverse, work)
    norm[work.hub_rows] = torch.stack([largest, 1 / total], 1)


@lru_cache(maxsize=256)
def _top_kernel(spec: EdgeSpec, *, pieces: bool) -> Compiled:
    view = spec.view("edge_attention_top", "receiver")
    k, h, d_k = view.kernel, spec.h, spec.d_k
    largest = k.matrix("largest")
    own_rows = [(view.own, h * d_k), (largest, h)]
    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=view.own_edges) as row:
        for group in view.groups:
            group.store(largest.row(row.out), _largest_score(view, group, row, None))
    return Compiled(k)


def find_top(inputs: EdgeInputs, csr: Csr) -> Tensor:
    """The largest score of each receiver and head, `[N, H]`; −inf where there is no edge."""
    n, h, _ = inputs.q.shape
    work, arguments = csr.work, inputs.arguments(csr)
    largest = empty(n, h, dtype=inputs.q.dtype)
    kernel = _top_kernel(inputs.spec(csr), pieces=False)
    kernel(work, pieces=False, largest=largest, **arguments)
    if work.hub_rows.numel():
        partial = empty(work.piece_begin.numel(), h, dtype=inputs.q.dtype)
        kernel = _top_kernel(inputs.spec(csr), pieces=True)
        kernel(work, pieces=True, largest=partial, **arguments)
        largest[work.hub_rows] = _largest_of_hubs(partial, work)
    return largest


def _largest_of_hubs(partial: Tensor, work: Work) -> Tensor:
    return torch.segment_reduce(partial, "max", offsets=work.hub_pieces, axis=0, unsafe=True)
