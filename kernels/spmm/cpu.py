"""spmm: y[i,h,:] = Σ_{e in row i} a[e,h] · x[col[e],h,:], or x[col[e],0,:] for all heads

Work:     one task per 4096 edges; a row's sums stay in registers, 256 numbers (float32) a sweep.
Bytes:    4(N+1) + 4E + b(EH + 2NHd), b bytes per element, if each x row is read once;
          4(N+1) + 4E + b(EH + EHd + NHd) if no x row is reused. Of shared vectors b(EH + Nd + NHd),
          and b(EH + Ed + NHd).
Backward: dx = Aᵀ dy by the same sweep on the CSR of Aᵀ, summed over heads if they share x;
          da[e,h] = <dy[i,h,:], x[col[e],h,:]>, blocks of edges and heads. Saves a and x.
Order:    as in `cpu/rows.py`: bitwise repeatable for any number of threads.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.cpu.attention.scores import (
    HeadGroup,
    block_products,
    block_slots,
    head_groups,
    load_heads,
)
from grand_fast.kernels.cpu.attention.weighted_sum import head_terms, sums_of
from grand_fast.kernels.cpu.gathered_sums import Term, ahead, block_of, prefetch_rows
from grand_fast.kernels.cpu.language import Floats, Int, Kernel
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, each_row, sum_pieces
from grand_fast.kernels.csr import Csr


@lru_cache(maxsize=256)
def _spmm_fwd_kernel(
    h: int, d: int, dtype: torch.dtype, index: torch.dtype, *, shared: bool, of_senders: bool,
    pieces: bool,
) -> Compiled:  # fmt: skip
    """`of_senders`: the rows are those of Aᵀ, and values lie in slots of A."""
    k = Kernel("spmm_fwd", dtype, index)
    x, y, a, col = k.matrix("x"), k.matrix("y"), k.vector("a"), k.indices("col")
    own_rows = [] if pieces else [(y, h * d)]
    in_place = a if h == 1 and not of_senders else None
    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=in_place) as row:

        def values(e: Int) -> Floats:
            return a.at((k.indices("slot")[e] if of_senders else e + row.shift) * h)

        def prefetch(terms: list[Term], e: Int) -> None:
            later = ahead(k, e)
            prefetch_rows(col, later, [block_of(x, [term.chunk for term in terms])])
            if of_senders:
                values(later).prefetch(1)

        def terms(group: HeadGroup) -> list[Term]:
            return head_terms(group, x, lambda e: values(e).at(group.first), lanes=group.count)

        groups = head_groups(k, h, d, shared="far" if shared else None)
        of_heads = [term for group in groups for term in terms(group)]
        for total, c in sums_of(k, row, of_heads, prefetch=prefetch):
            y.row(row.out).at(c.start).store(total, c.lanes)
    return Compiled(k)


@lru_cache(maxsize=256)
def _spmm_bwd_da_kernel(
    h: int, d: int, dtype: torch.dtype, index: torch.dtype, *, shared: bool, pieces: bool
) -> Compiled:
    k = Kernel("spmm_bwd_da", dtype, index)
    dy, x, da, col = k.matrix("dy"), k.matrix("x"), k.vector("da"), k.indices("col")
    in_place = da if h == 1 else None
    with each_row(k, pieces=pieces, own_rows=[(dy, h * d)], own_edges=in_place) as row:
        for group in head_groups(k, h, d, shared="far" if shared else None):
            own = load_heads(group, dy.row(row.node))
            with k.loop(row.begin, row.end, group.edges) as e:
                for z in range(group.edges):
                    prefetch_rows(col, ahead(k, e + z), [(x, d if shared else h * d)])
                others = [x.row(col[slot]) for slot in block_slots(group, row, e)]
                products = block_products(group, own, others)
                n = (row.end - e).minimum(group.edges)
                group.store_slots(da, e + row.shift, n, h, products)
    return Compiled(k)


def spmm_fwd(
    x: Float[Tensor, "N K d"], a: Float[Tensor, "E H"], *, csr: Csr
) -> Float[Tensor, "N H d"]:
    """The product of the matrices `A_h`, whose values are `a` in the slot order of `csr`, with x.

    K is 1 or H.
    """
    return _product(x, a, csr)


def spmm_bwd(
    dy: Float[Tensor, "N H d"],
    x: Float[Tensor, "N K d"],
    a: Float[Tensor, "E H"],
    *,
    csr: Csr,
    csr_t: Csr,
    needs_dx: bool,
    needs_da: bool,
) -> tuple[Float[Tensor, "N K d"] | None, Float[Tensor, "E H"] | None]:
    """The gradients by `x` and `a` (slot order of `csr`) that are needed."""
    shared = x.shape[1] < dy.shape[1]
    dx = da = None
    if needs_dx:
        dx = _product(dy, a, csr_t)
        dx = dx.sum(1, keepdim=True) if shared else dx
    if needs_da:
        da = empty(*a.shape, dtype=a.dtype)
        arguments = _arguments(csr) | {"dy": dy, "x": x, "da": da}
        for pieces in (False, True):
            if not pieces or csr.work.hub_rows.numel():
                kernel = _spmm_bwd_da_kernel(
                    *dy.shape[1:], x.dtype, csr.col.dtype, shared=shared, pieces=pieces
                )
                kernel(csr.work, pieces=pieces, **arguments)
    return dx, da


def _product(x: Tensor, a: Tensor, csr: Csr) -> Tensor:
    """On the view of A or of Aᵀ."""
    (n, heads, d), h, work = x.shape, a.shape[1], csr.work
    y = empty(n, h, d, dtype=x.dtype)
    switches: Any = {"shared": heads < h, "of_senders": csr.slot is not None}
    arguments = _arguments(csr) | {"x": x, "a": a}
    kernel = _spmm_fwd_kernel(h, d, x.dtype, csr.col.dtype, **switches, pieces=False)
    kernel(work, pieces=False, y=y, **arguments)
    if work.hub_rows.numel():
        partial = empty(work.piece_begin.numel(), h, d, dtype=x.dtype)
        kernel = _spmm_fwd_kernel(h, d, x.dtype, csr.col.dtype, **switches, pieces=True)
        kernel(work, pieces=True, y=partial, **arguments)
        y[work.hub_rows] = sum_pieces(partial, work)
    return y


def _arguments(csr: Csr) -> dict[str, Any]:
    """What kernels take of a view."""
    slot = {} if csr.slot is None else {"slot": csr.slot}
    return {"col": csr.col, "rowptr": csr.rowptr, "last_edge": csr.col.numel() - 1} | slot
