"""edge_softmax: a[e,h] = p(s[e,h]) / Σ p(s[e',h]) over the edges e' of e's receiver or sender

Work:     one task per 4096 edges; as many edges at a time as fill a register with edges × heads.
          Three sweeps over a row: its largest score, Σ p, the weights.
Bytes:    4(N+1) + 2b·EH + 8NH, b bytes per element, if a row's scores stay in cache from one
          sweep to the next; 4b·EH instead of 2b·EH if not. Over the edges of senders, scores and
          weights are laid out in the order of the CSR of Aᵀ first: 4b·EH more.
Backward: ds = a ρ (t − Δ), Δ = Σ a t over the group, t = da; two sweeps that compute a again.
          Saves s and norm.
Order:    as in `cpu/rows.py`: bitwise repeatable for any number of threads.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.cpu.attention.head_blocks import Block, EdgeView, Norm
from grand_fast.kernels.cpu.attention.normalizer import SUM_EDGES, join_norm
from grand_fast.kernels.cpu.attention.scores import HeadGroup
from grand_fast.kernels.cpu.gathered_sums import stretches
from grand_fast.kernels.cpu.language import REGISTER_BYTES, Int, Kernel, Vec
from grand_fast.kernels.cpu.math import fma, maximum, where_positive
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, Row, Shares, each_row, sum_pieces
from grand_fast.kernels.csr import Csr, in_slots, in_view
from grand_fast.kernels.weighting import Weighting

Step = Literal["whole", "sums", "edges"]


class _Edges:
    """A kernel's view of tables `[E, H]`, whose rows are those of groups.

    in_a: they lie in the slots of `A`, as the rows of its view are not; else in the view's own.
    """

    def __init__(
        self, name: str, h: int, dtype: torch.dtype, index: torch.dtype, weighting: Weighting
    ) -> None:
        self.kernel, self.h = Kernel(name, dtype, index), h
        self.in_a = weighting.normalize == "receiver"
        self.view = EdgeView(self.kernel, weighting.normalize, h, 1, weighting, weighted=False)

    def _slot(self, row: Row, e: Int) -> Int:
        return e + row.shift if self.in_a else e

    def load(self, name: str, group: HeadGroup, row: Row, e: Int) -> Vec:
        """Of a block; 0 beyond the row."""
        table, n = self.kernel.vector(name), row.end - e
        return group.load_slots(table, self._slot(row, e), n.minimum(group.edges), self.h)

    def store(self, name: str, group: HeadGroup, row: Row, e: Int, vec: Vec) -> None:
        """Of a block."""
        table, n = self.kernel.vector(name), row.end - e
        group.store_slots(table, self._slot(row, e), n.minimum(group.edges), self.h, vec)

    def weights(self, group: HeadGroup, row: Row, e: Int, norm: Norm) -> tuple[Vec, Vec]:
        """`a` and `a ρ` of a block; 0 beyond the row."""
        return self.view.weights(group, Block(row, e, [], []), self.load("s", group, row, e), norm)

    def sums(
        self, group: HeadGroup, row: Row, count: int, terms: Callable[[Int], list[Vec]]
    ) -> list[Vec]:
        """Of each head the sums over the row's edges of `count` terms of each block."""
        k = self.kernel
        totals = [k.variable(k.splat(0.0)) for _ in range(count)]
        with stretches(k, row, SUM_EDGES) as part:
            partial = [k.variable(k.splat(0.0)) for _ in range(count)]
            with k.loop(part.begin, part.end, group.edges) as e:
                for of_stretch, term in zip(partial, terms(e), strict=True):
                    of_stretch.value = of_stretch.value + term
            for total, of_stretch in zip(totals, partial, strict=True):
                total.value = total.value + of_stretch.value
        return [group.over_edges(total.value) for total in totals]


@lru_cache(maxsize=256)
def _edge_softmax_fwd_kernel(
    h: int, dtype: torch.dtype, index: torch.dtype, weighting: Weighting, *, step: Step
) -> Compiled:
    """`whole` rows; or for pieces of long rows first their `sums`, then, norm known, `edges`."""
    edges = _Edges("edge_softmax_fwd", h, dtype, index, weighting)
    k, view = edges.kernel, edges.view
    norm = k.matrix("norm")
    with each_row(k, pieces=step != "whole", own_rows=[(norm, 2 * h)]) as row:
        for group in view.groups:
            known = view.own_norm(group, row) if step == "edges" else _norm(edges, group, row)
            assert known is not None
            if step != "edges":
                view.store_norm(group, norm.row(row.out), known)
            if step != "sums":
                with k.loop(row.begin, row.end, group.edges) as e:
                    edges.store("a", group, row, e, edges.weights(group, row, e, known)[0])
    return Compiled(k)


def _norm(edges: _Edges, group: HeadGroup, row: Row) -> Norm:
    """What normalises the scores of a row."""
    k, view = edges.kernel, edges.view
    lowest = k.splat(-math.inf)
    largest = k.variable(lowest)
    if view.weighting.normalizer == "softmax":
        with k.loop(row.begin, row.end, group.edges) as e:
            s = edges.load("s", group, row, e).first((row.end - e) * group.width, lowest)
            largest.value = maximum(s, largest.value)
    shift = group.over_edges(largest.value, maximum)

    def terms(e: Int) -> list[Vec]:
        p = view.unnormalised(edges.load("s", group, row, e), shift)
        return [p.first((row.end - e) * group.width, k.splat(0.0))]

    (total,) = edges.sums(group, row, 1, terms)
    # infinite, but never read, in a row without edges
    return Norm(shift if view.weighting.normalizer == "softmax" else None, k.splat(1.0) / total)


@lru_cache(maxsize=256)
def _edge_softmax_bwd_kernel(
    h: int, dtype: torch.dtype, index: torch.dtype, weighting: Weighting, *, step: Step
) -> Compiled:
    """`whole` rows; or for pieces of long rows first their `sums`, then, Δ known, `edges`."""
    edges = _Edges("edge_softmax_bwd", h, dtype, index, weighting)
    k, view = edges.kernel, edges.view
    with each_row(k, pieces=step != "whole", own_rows=[(k.matrix("norm"), 2 * h)]) as row:
        for group in view.groups:
            norm = view.own_norm(group, row)
            assert norm is not None

            def terms(e: Int, group: HeadGroup = group, norm: Norm = norm) -> list[Vec]:
                a, _ = edges.weights(group, row, e, norm)
                return [a * edges.load("da", group, row, e), a]

            if step == "edges":
                delta = group.load([k.matrix("delta").row(row.node)])
            else:
                delta, total = edges.sums(group, row, 2, terms)
                if step == "sums":
                    group.store(k.matrix("delta").row(row.out), delta)
                    group.store(k.matrix("sum_a").row(row.out), total)
                    continue
                # Σ a is 1 but for roundings, and Σ ds, 0 by rights, would be wrong by as much.
                delta = delta / where_positive(total, total, k.splat(1.0))
            of_top = k.variable(k.splat(0.0))
            with k.loop(row.begin, row.end, group.edges) as e:
                a_rho = edges.weights(group, row, e, norm)[1]
                ds = a_rho * (edges.load("da", group, row, e) - delta)
                edges.store("ds", group, row, e, ds)
                of_top.value = of_top.value + ds
            if weighting.normalizer == "squareplus":
                share = k.matrix("dtop").row(row.task)
                share.store(fma(of_top.value, group.of_heads(-1.0), share.load()))
    return Compiled(k)


def edge_softmax_fwd(
    s: Float[Tensor, "E H"],
    *,
    weighting: Weighting,
    top: Float[Tensor, ""] | None = None,
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "E H"], Float[Tensor, "N 2 H"]]:
    """Weights `a` of the scores `s`, in slot order, and `norm`."""
    view = weighting.groups(csr, csr_t)
    work, h, a = view.work, s.shape[1], empty(*s.shape, dtype=s.dtype)
    norm = empty(view.rowptr.numel() - 1, 2, h, dtype=s.dtype)
    arguments = _arguments(view, top, s.dtype) | {"s": in_view(s, view), "a": a}
    shape = (h, s.dtype, view.col.dtype, weighting)
    _edge_softmax_fwd_kernel(*shape, step="whole")(work, pieces=False, norm=norm, **arguments)
    if work.hub_rows.numel():
        partial = empty(work.piece_begin.numel(), 2, h, dtype=s.dtype)
        for step, table in (("sums", partial), ("edges", norm)):
            kernel = _edge_softmax_fwd_kernel(*shape, step=step)
            kernel(work, pieces=True, norm=table, **arguments)
            if step == "sums":
                join_norm(norm, partial, work)
    return in_slots(a, view), norm


def edge_softmax_bwd(
    da: Float[Tensor, "E H"],
    s: Float[Tensor, "E H"],
    *,
    weighting: Weighting,
    top: Float[Tensor, ""] | None = None,
    norm: Float[Tensor, "N 2 H"],
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "E H"], Float[Tensor, ""] | None]:
    """Gradients by the scores, and by the largest of them as if it were an input."""
    view = weighting.groups(csr, csr_t)
    work, h, ds = view.work, s.shape[1], empty(*s.shape, dtype=s.dtype)
    arguments = _arguments(view, top, s.dtype) | {"norm": norm, "ds": ds}
    arguments |= {"s": in_view(s, view), "da": in_view(da, view)}
    shape = (h, s.dtype, view.col.dtype, weighting)
    pieces = work.piece_begin.numel()
    of_rows, of_pieces = (
        Shares(n, REGISTER_BYTES // s.element_size(), s.dtype) for n in (work.turn.numel(), pieces)
    )
    kernel = _edge_softmax_bwd_kernel(*shape, step="whole")
    kernel(work, pieces=False, dtop=of_rows.tensor, **arguments)
    if pieces:
        delta, sum_a = (empty(pieces, h, dtype=s.dtype) for _ in range(2))
        kernel = _edge_softmax_bwd_kernel(*shape, step="sums")
        kernel(work, pieces=True, delta=delta, sum_a=sum_a, **arguments)
        of_nodes = empty(*norm[:, 0].shape, dtype=s.dtype)
        of_nodes[work.hub_rows] = sum_pieces(delta, work) / sum_pieces(sum_a, work)
        kernel = _edge_softmax_bwd_kernel(*shape, step="edges")
        kernel(work, pieces=True, delta=of_nodes, dtop=of_pieces.tensor, **arguments)
    dtop = None if top is None else of_rows.total().sum() + of_pieces.total().sum()
    return in_slots(ds, view), dtop


def _arguments(view: Csr, top: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """What kernels take of a view, and the largest score."""
    named = {"rowptr": view.rowptr}
    return named if top is None else named | {"top": top.to(dtype)}
