"""The projections of a state, `y = x Wᵀ + b` for many rows and few channels, and their backward.

Work:     one task per slab of rows; sums of TILE_ROWS rows and some registers of columns, in
          registers; W repacked once a call, so that a panel of its columns stays in the nearest
          cache. The gradient by W is summed over slabs that depend on N alone, then over the slabs.
Bytes:    b(N(c + m) + cm), b bytes per element, forward; by x and W each b(N(c + m) + cm) again.
Flops:    2Ncm each.
Order:    bitwise repeatable for any number of threads, which a BLAS library does not promise. It
          also needs no OpenMP team, whose threads keep spinning beside those of the edge passes.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from grand_fast.kernels.cpu.language import Chunk, Floats, Int, Kernel, chunks
from grand_fast.kernels.cpu.machine_code import has_wide_registers
from grand_fast.kernels.cpu.math import fma
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, Shares, slabs

TILE_ROWS = 6
_SLAB_ROWS = 192  # a multiple of TILE_ROWS; with its results it fits the second cache
_GRADIENT_SLABS = 64  # at most: enough tasks for the threads, few partial gradients to add up
_GRADIENT_BYTES = 32 << 20  # of all partial gradients together
_GRADIENT_ROWS = 128  # of a slab at a time: a panel of x stays in the nearest cache


def _tile_columns() -> int:
    """Registers of columns in a tile: TILE_ROWS times as many sums, which must fit the registers.

    Of 32 registers of 512 bits, 24 hold sums; elsewhere one `Vec` takes two or four registers.
    """
    return 4 if has_wide_registers() else 1


@lru_cache(maxsize=64)
def _product_kernel(
    inner: int, columns: int, dtype: torch.dtype, *, has_bias: bool, accumulate: bool
) -> Compiled:
    """`y[i,:] = Σ_c x[i,c] · packed[c,:]`, plus the bias or what `y` holds already."""
    k = Kernel("product", dtype, torch.int64)
    x, y, bounds = k.matrix("x"), k.matrix("y"), k.longs("bounds")

    def tile(first: Int, n_rows: int, packed: Floats, panel: list[Chunk]) -> None:
        rows = [x.row(first + r) for r in range(n_rows)]
        if accumulate:  # what the sums are added to comes from memory while they are formed
            for r in range(n_rows):
                y.row(first + r).at(panel[0].start).prefetch(sum(c.lanes for c in panel))
        row_elements = len(panel) * k.lanes
        start = [
            k.vector("bias").at(c.start).load(c.lanes) if has_bias else k.splat(0.0) for c in panel
        ]
        sums = [[k.variable(vec) for vec in start] for _ in rows]
        with k.loop(0, inner) as c:
            line = packed.at(c * row_elements)
            weights = [line.at(v * k.lanes).load() for v in range(len(panel))]
            for row, row_sums in zip(rows, sums, strict=True):
                value = row.at(c).splat()
                for weight, total in zip(weights, row_sums, strict=True):
                    total.value = fma(value, weight, total.value)
        for r, row_sums in enumerate(sums):
            out = y.row(first + r)
            for total, chunk in zip(row_sums, panel, strict=True):
                place = out.at(chunk.start)
                result = total.value + place.load(chunk.lanes) if accumulate else total.value
                place.store(result, chunk.lanes)

    with k.tasks() as task:
        begin, end = bounds[task], bounds[task + 1]
        tiles_end = begin + (end - begin) // TILE_ROWS * TILE_ROWS
        for panel in _panels(columns, k.lanes):
            packed = k.vector("packed").at(panel[0].start * inner)
            with k.loop(begin, tiles_end, TILE_ROWS) as first:
                tile(first, TILE_ROWS, packed, panel)
            with k.loop(tiles_end, end) as first:
                tile(first, 1, packed, panel)
    return Compiled(k)


@lru_cache(maxsize=64)
def _gradient_kernel(m: int, columns: int, dtype: torch.dtype) -> Compiled:
    """Each task's share of `dW[r,:] = Σ_i dy[i,r] · x[i,:]` and of `db = Σ_i dy[i,:]`."""
    k = Kernel("product_gradient", dtype, torch.int64)
    dy, x, bounds = k.matrix("dy"), k.matrix("x"), k.longs("bounds")
    panels = _panels(columns, k.lanes)

    def tile(block: tuple[Int, Int], out: Floats, r: Int, n_rows: int, panel: list[Chunk]) -> None:
        places = [[out.at((r + z) * columns + c.start) for c in panel] for z in range(n_rows)]
        sums = [
            [k.variable(place.load(c.lanes)) for place, c in zip(row, panel, strict=True)]
            for row in places
        ]
        with k.loop(*block) as i:
            x_row, dy_row = x.row(i), dy.row(i).at(r)
            values = [x_row.at(c.start).load(c.lanes) for c in panel]
            for z, row_sums in enumerate(sums):
                scale = dy_row.at(z).splat()
                for value, total in zip(values, row_sums, strict=True):
                    total.value = fma(scale, value, total.value)
        for row, row_sums in zip(places, sums, strict=True):
            for place, total, c in zip(row, row_sums, panel, strict=True):
                place.store(total.value, c.lanes)

    with k.tasks() as task:
        weight_share, bias_share = k.matrix("dweight").row(task), k.matrix("dbias").row(task)
        end = bounds[task + 1]
        with k.loop(bounds[task], end, _GRADIENT_ROWS) as begin:
            block = (begin, (begin + _GRADIENT_ROWS).minimum(end))
            for panel in panels:
                tiles = m // TILE_ROWS * TILE_ROWS
                with k.loop(0, tiles, TILE_ROWS) as r:
                    tile(block, weight_share, r, TILE_ROWS, panel)
                if tiles < m:
                    tile(block, weight_share, k.integer(tiles), m - tiles, panel)
            with k.loop(*block) as i:
                for c in chunks(m, k.lanes):
                    place = bias_share.at(c.start)
                    value = dy.row(i).at(c.start).load(c.lanes)
                    place.store(place.load(c.lanes) + value, c.lanes)
    return Compiled(k)


@lru_cache(maxsize=256)
def _panels(columns: int, lanes: int) -> list[list[Chunk]]:
    """The columns, in panels as wide as a tile."""
    whole = chunks(columns, lanes)
    width = _tile_columns()
    return [whole[i : i + width] for i in range(0, len(whole), width)]


def _packed(weight: Tensor, lanes: int) -> Tensor:
    """`weight [inner, columns]`, panel by panel, the last filled up to whole registers."""
    panels = [
        weight[:, p[0].start : p[-1].start + p[-1].lanes] for p in _panels(weight.shape[1], lanes)
    ]
    short = -weight.shape[1] % lanes
    if short:
        panels[-1] = functional.pad(panels[-1], (0, short))
    if len(panels) == 1:
        return panels[0].contiguous()
    return torch.cat([panel.reshape(-1) for panel in panels])


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, accumulate: bool
) -> None:
    """`y = x · weight + bias`, or `y += x · weight`; weight `[inner, columns]`."""
    _Packed(weight, bias, accumulate=accumulate)(x, y)


class _Packed:
    """`_product` for many x."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, accumulate: bool) -> None:
        options = {"has_bias": bias is not None, "accumulate": accumulate}
        self._kernel = _product_kernel(*weight.shape, weight.dtype, **options)
        self._arguments: dict[str, Any] = {"packed": _packed(weight, self._kernel.lanes)}
        if bias is not None:
            self._arguments["bias"] = bias.contiguous()

    def __call__(self, x: Tensor, y: Tensor) -> None:
        work = slabs(x.shape[0], _SLAB_ROWS)
        self._kernel(work, pieces=False, x=x, y=y, **self._arguments)


class Projection:
    """`x [N, c]` → `x weightᵀ + bias` `[N, m]`; the weights are packed once."""

    def __init__(self, weight: Float[Tensor, "m c"], bias: Float[Tensor, " m"]) -> None:
        self._columns = weight.shape[0]
        self._product = _Packed(weight.detach().t(), bias.detach(), accumulate=False)

    def __call__(self, x: Float[Tensor, "N c"]) -> Float[Tensor, "N m"]:
        """One product."""
        y = empty(x.shape[0], self._columns, dtype=x.dtype)
        self._product(x, y)
        return y


def add_input_gradient(
    dx: Float[Tensor, "N c"], dy: Float[Tensor, "N m"], weight: Float[Tensor, "m c"]
) -> None:
    """`dx += dy weight`, in place."""
    _product(dy, weight, None, dx, accumulate=True)


def parameter_gradients(
    dy: Float[Tensor, "N m"], x: Float[Tensor, "N c"]
) -> tuple[Float[Tensor, "m c"], Float[Tensor, " m"]]:
    """`dyᵀ x`, and the sums of the columns of `dy`."""
    (n, m), c = dy.shape, x.shape[1]
    slabs_fit = max(1, min(_GRADIENT_SLABS, _GRADIENT_BYTES // (m * c * x.element_size() + 1)))
    work = slabs(n, max(-(-n // slabs_fit), _GRADIENT_ROWS))
    shares = work.bounds.numel() - 1
    dweight, dbias = Shares(shares, m * c, x.dtype), Shares(shares, m, x.dtype)
    _gradient_kernel(m, c, x.dtype)(
        work, pieces=False, dy=dy, x=x, dweight=dweight.tensor, dbias=dbias.tensor
    )
    return dweight.total().view(m, c), dbias.total()


_DOT_SLABS, _DOT_ROWS = 64, 128  # of `column_dots`: at most, at least
_DOT_PANEL = 4  # registers of columns at a time


@lru_cache(maxsize=64)
def _column_dots_kernel(columns: int, dtype: torch.dtype) -> Compiled:
    k = Kernel("column_dots", dtype, torch.int64)
    a, b, bounds, share = k.matrix("a"), k.matrix("b"), k.longs("bounds"), k.matrix("share")
    whole = chunks(columns, k.lanes)
    with k.tasks() as task:
        for start in range(0, len(whole), _DOT_PANEL):
            panel = whole[start : start + _DOT_PANEL]
            sums = [k.variable(k.splat(0.0)) for _ in panel]
            with k.loop(bounds[task], bounds[task + 1]) as i:
                for c, total in zip(panel, sums, strict=True):
                    left, right = (m.row(i).at(c.start).load(c.lanes) for m in (a, b))
                    total.value = fma(left, right, total.value)
            for c, total in zip(panel, sums, strict=True):
                share.row(task).at(c.start).store(total.value, c.lanes)
    return Compiled(k)


def column_dots(a: Float[Tensor, "N d"], b: Float[Tensor, "N d"]) -> Float[Tensor, " d"]:
    """`Σ_i a[i,:] · b[i,:]`, column by column, of tensors with contiguous rows; `2bNd` bytes."""
    n, d = a.shape
    work = slabs(n, max(_DOT_ROWS, -(-n // _DOT_SLABS)))
    shares = Shares(work.bounds.numel() - 1, d, a.dtype)
    _column_dots_kernel(d, a.dtype)(work, pieces=False, a=a, b=b, share=shares.tensor)
    return shares.total()
