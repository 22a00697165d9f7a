"""csr_diffusion: f[i,:] = alpha · (Σ_{e in row i} a[e] · x[col[e],:] − x[i,:]) + beta · x0[i,:]

Work:     one task per 4096 edges; a row's sums stay in registers, 256 channels (float32) a sweep.
Bytes:    4(N+1) + 4E + b(E + 2Nd), b bytes per element, if each x row is read once;
          4(N+1) + 4E + b(E + Ed + 2Nd) if no x row is reused.
Backward: dx = alpha · (Aᵀ df − df) by the same sweep on the CSR of Aᵀ;
          da[e] = <alpha · df[i], x[col[e]]>; dalpha = Σ_j x[j] · (Aᵀ df − df)[j]. Saves a and x.
Order:    as in `cpu/rows.py`: bitwise repeatable for any number of threads.
"""

import functools
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.cpu.gathered_sums import (
    BLOCK_EDGES,
    Term,
    ahead,
    block_of,
    channel_blocks,
    field_arguments,
    field_rows,
    finish_field,
    finish_field_gradient,
    prefetch_rows,
    store_field_gradient,
    store_partial,
    sum_field,
    weighted_sum,
)
from grand_fast.kernels.cpu.language import Chunk, Int, Kernel, Vec, chunks
from grand_fast.kernels.cpu.math import fma, transposed_sum
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, Row, Shares, each_row
from grand_fast.kernels.csr import Add, Csr


@lru_cache(maxsize=256)
def _csr_diffusion_fwd_kernel(
    d: int, dtype: torch.dtype, index: torch.dtype, *, has_source: bool, n_add: int, pieces: bool
) -> Compiled:
    k = Kernel("csr_diffusion_fwd", dtype, index)
    a = k.vector("a")
    own_rows = [] if pieces else field_rows(k, d, has_source=has_source, n_add=n_add)
    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=a) as row:

        def weight(e: Int, row: Row = row) -> Vec:
            return a.at(e + row.shift).splat()

        sum_field(k, row, d, weight, has_source=has_source, n_add=n_add, pieces=pieces)
    return Compiled(k)


@lru_cache(maxsize=256)
def _csr_diffusion_bwd_dx_kernel(
    d: int, dtype: torch.dtype, index: torch.dtype, *, needs_dalpha: bool, pieces: bool
) -> Compiled:
    k = Kernel("csr_diffusion_bwd_dx", dtype, index)
    df, a, col, slot = k.matrix("df"), k.vector("a"), k.indices("col"), k.indices("slot")

    def weight(e: Int) -> Vec:
        return a.at(slot[e]).splat()

    own_rows = [] if pieces else [(df, d), (k.matrix("dx"), d)]
    own_rows += [(k.matrix("x"), d)] if needs_dalpha else []
    with each_row(k, pieces=pieces, own_rows=own_rows) as row:
        for block in channel_blocks(d, k.lanes):

            def prefetch(e: Int, block: list[Chunk] = block) -> None:
                prefetch_rows(col, ahead(k, e), [block_of(df, block)])
                a.at(slot[ahead(k, e)]).prefetch(1)

            terms = [Term(df, c, weight) for c in block]
            atg = weighted_sum(k, row, col, terms, prefetch=prefetch)
            if pieces:
                store_partial(k, "partial", row, block, atg)
            else:
                store_field_gradient(k, row, block, atg, df, needs_dalpha=needs_dalpha)
    return Compiled(k)


@lru_cache(maxsize=256)
def _csr_diffusion_bwd_da_kernel(
    d: int, dtype: torch.dtype, index: torch.dtype, *, pieces: bool
) -> Compiled:
    k = Kernel("csr_diffusion_bwd_da", dtype, index)
    df, x, alpha = k.matrix("df"), k.matrix("x"), k.vector("alpha")
    da, col = k.vector("da"), k.indices("col")
    channels = chunks(d, k.lanes)
    with each_row(k, pieces=pieces, own_rows=[(df, d)], own_edges=da) as row:
        g = [
            alpha.at(c.start).load(c.lanes) * df.row(row.node).at(c.start).load(c.lanes)
            for c in channels
        ]
        with k.loop(row.begin, row.end, BLOCK_EDGES) as e:
            for z in range(BLOCK_EDGES):
                prefetch_rows(col, ahead(k, e + z), [(x, d)])

            def dot(z: int, e: Int = e) -> Vec:
                sender = x.row(col[(e + z).minimum(row.end - 1)])
                total = k.splat(0.0)
                for c, g_c in zip(channels, g, strict=True):
                    total = fma(g_c, sender.at(c.start).load(c.lanes), total)
                return total

            products = transposed_sum(
                [functools.partial(dot, z) for z in range(BLOCK_EDGES)], k.lanes
            )
            spread = k.lanes // BLOCK_EDGES  # lanes that hold the same edge's product
            products = products.shuffle([i * spread % k.lanes for i in range(k.lanes)])
            da.at(e + row.shift).store_first(products, (row.end - e).minimum(BLOCK_EDGES))
    return Compiled(k)


def csr_diffusion_fwd(
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    *,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add = (),
    csr: Csr,
) -> Float[Tensor, "N d"]:
    """The vector field of a diffusion with given weights `a`, in the slot order of `csr`."""
    n, d = x.shape
    work, has_source = csr.work, x0 is not None
    f = empty(n, d, dtype=x.dtype)
    arguments = field_arguments(f, x, alpha=alpha, beta=beta, x0=x0, add=add)
    arguments |= {"a": a, "col": csr.col, "rowptr": csr.rowptr}
    arguments["last_edge"] = csr.col.numel() - 1
    shape = (d, x.dtype, csr.col.dtype)
    _csr_diffusion_fwd_kernel(*shape, has_source=has_source, n_add=len(add), pieces=False)(
        work, pieces=False, **arguments
    )
    if work.hub_rows.numel():
        partial = empty(work.piece_begin.numel(), d, dtype=x.dtype)
        kernel = _csr_diffusion_fwd_kernel(*shape, has_source=False, n_add=0, pieces=True)
        kernel(work, pieces=True, partial=partial, **arguments)
        finish_field(partial, work, arguments, add)
    return f


def csr_diffusion_bwd(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    *,
    alpha: Float[Tensor, " d"],
    x_scale: float = 0.0,
    csr: Csr,
    csr_t: Csr,
    needs_dx: bool,
    needs_da: bool,
    needs_dalpha: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by `x`, `a` (slot order of `csr`) and `alpha` that are needed."""
    n, d = x.shape
    alpha = alpha.to(x.dtype)
    shape = (d, x.dtype, csr.col.dtype)
    arguments: dict[str, Any] = {
        "df": df,
        "x": x,
        "a": a,
        "alpha": alpha,
        "last_edge": csr.col.numel() - 1,
    }
    dx = da = dalpha = None
    if needs_da:
        da = empty(*a.shape, dtype=a.dtype)
        for pieces in (False, True):
            if not pieces or csr.work.hub_rows.numel():
                _csr_diffusion_bwd_da_kernel(*shape, pieces=pieces)(
                    csr.work, pieces=pieces, da=da, col=csr.col, rowptr=csr.rowptr, **arguments
                )
    if needs_dx or needs_dalpha:
        work = csr_t.work
        dx = empty(n, d, dtype=x.dtype)
        shares = Shares(work.turn.numel(), d, x.dtype) if needs_dalpha else None
        arguments |= {"col": csr_t.col, "rowptr": csr_t.rowptr, "slot": csr_t.slot}
        arguments["dx"] = dx
        if shares is not None:
            arguments["dalpha"] = shares.tensor
        arguments["x_scale"] = x.new_tensor([x_scale])
        _csr_diffusion_bwd_dx_kernel(*shape, needs_dalpha=needs_dalpha, pieces=False)(
            work, pieces=False, **arguments
        )
        dalpha = None if shares is None else shares.total()
        if work.hub_rows.numel():
            partial = empty(work.piece_begin.numel(), d, dtype=x.dtype)
            kernel = _csr_diffusion_bwd_dx_kernel(*shape, needs_dalpha=False, pieces=True)
            kernel(work, pieces=True, partial=partial, **arguments)
            finish_field_gradient(
                dx, dalpha, partial, work, df=df, x=x, alpha=alpha, x_scale=x_scale
            )
    return dx if needs_dx else None, da, dalpha
