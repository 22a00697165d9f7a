"""Compile-time sizes of the tiles of a GPU kernel: lanes, chunks, heads, edges.

A row of a table is read by LANES lanes, VEC columns each at a time, in as many chunks as it takes;
the lanes that are left over read other rows, the groups: `gpu/tiles.py`.

Below, `most` is how many columns a lane may read at once: at most `load_columns`.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

# A lane reads 128 bits of float32 at once. With 128 bits of a half type, half the lanes would read
# a row, each with twice the registers: fewer warps, slower where two tables are gathered.
LANE_COLUMNS = 4
_WARP_COLUMNS = 512  # a wider row is shared by more warps, at the price of a barrier a turn


class Sizes(dict[str, int]):
    """All sizes of a kernel as one argument: `sizes["BLOCK_H"]` here, `sizes.BLOCK_H` in a kernel.

    BLOCK_E, BLOCK_G: edges of a turn, see `edges`.
    H, d_k; BLOCK_H, BLOCK_K, BLOCK_A, VEC_A, N_A, N_H: of q and k, see `head_sizes`.
    d; BLOCK_D, VEC_D, N_D: of x, see `value_sizes`; or of a mean over heads, see `product_sizes`.

    Made once by functions that keep them: a launch looks its kernel up by their hash.
    """

    def __getattr__(self, name: str) -> tl.constexpr:
        if name not in self:
            raise AttributeError(name)
        return tl.constexpr(self[name])

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def row_warps(width: int) -> int:
    """Warps that share a row of `width` columns."""
    return min(8, max(1, int(triton.next_power_of_2(width)) // _WARP_COLUMNS))


def vector(width: int, most: int) -> int:
    """Columns that one load of a lane takes: rows of `width` columns begin at multiples of it."""
    return min(most, width & -width)


def load_columns(dtype: torch.dtype) -> int:
    """Columns that a lane can read at once, in 128 bits."""
    return 16 // dtype.itemsize


def value_lanes(d: int, most: int) -> int:
    """Lanes that read a row of `d` columns at once, each as much as it can in one load."""
    return min(32 * row_warps(d), max(1, int(triton.next_power_of_2(d)) // vector(d, most)))


def head_lanes(h: int, d_k: int, most: int) -> int:
    """Lanes that read a row of q or k at once, each as much as it can in one load."""
    width = int(triton.next_power_of_2(h)) * int(triton.next_power_of_2(d_k))
    return min(32 * row_warps(width), max(1, width // vector(d_k, most)))


def head_sizes(h: int, d_k: int, lanes: int, most: int) -> dict[str, int]:
    """Sizes of q or k: N_A chunks of BLOCK_A columns, N_H times BLOCK_H heads.

    A head has BLOCK_K columns; heads and columns come padded. It spans several chunks, or a chunk
    has several heads.
    """
    heads, block_k = int(triton.next_power_of_2(h)), int(triton.next_power_of_2(d_k))
    block_k = max(block_k, lanes // heads)
    vec = min(vector(d_k, most), heads * block_k // lanes, block_k)
    block_h = max(1, lanes * vec // block_k)
    return {
        "H": h,
        "d_k": d_k,
        "BLOCK_H": block_h,
        "BLOCK_K": block_k,
        "BLOCK_A": lanes * vec,
        "VEC_A": vec,
        "N_A": heads * block_k // (lanes * vec),
        "N_H": heads // block_h,
    }


def value_sizes(d: int, lanes: int, most: int) -> dict[str, int]:
    """Sizes of a row of `d` columns: N_D chunks of BLOCK_D."""
    vec = vector(d, most)
    return {"d": d, "BLOCK_D": lanes * vec, "VEC_D": vec, "N_D": triton.cdiv(d, lanes * vec)}


def edges(sizes: dict[str, int], values: int, *, scalars: int = 1) -> dict[str, Any]:
    """`sizes` with the edges that a program gathers at a time, `[BLOCK_E, BLOCK_G]`; `num_warps`.

    Args:
        sizes: those of the tables, of `head_sizes` and `value_sizes`, whose lanes are the same:
            more than a warp's that read one row are of several warps.
        values: elements that a lane may hold of all tiles.
        scalars: numbers gathered per edge in one load next to the tables: 1, its index, or more.
    """
    table = "A" if "BLOCK_A" in sizes else "D"
    lanes = sizes[f"BLOCK_{table}"] // sizes[f"VEC_{table}"]
    warps = max(1, lanes // 32)
    groups = 32 * warps // lanes
    of_edge = sum(sizes.get(f"N_{t}", 0) * sizes.get(f"VEC_{t}", 0) for t in "AD")
    # A load of one scalar per lane or more gets a layout of its own, and drags the scores into it
    # through shared memory: stay below.
    most = min(values // of_edge, 16 * warps // (groups * scalars))
    block_e = 1 << max(0, most.bit_length() - 1)
    return {"sizes": Sizes(sizes, BLOCK_E=block_e, BLOCK_G=groups), "num_warps": warps}


@lru_cache(maxsize=256)
def score_sizes(
    h: int, d_k: int, dtype: torch.dtype, values: int, *, per_head: bool = False
) -> dict[str, Any]:
    """Of a kernel that gathers keys alone, or queries.

    `values` as in `edges`; with `per_head`, numbers of every head are gathered beside.
    """
    most = load_columns(dtype)
    sizes = head_sizes(h, d_k, head_lanes(h, d_k, most), most)
    return edges(sizes, values, scalars=sizes["BLOCK_H"] if per_head else 1)


@lru_cache(maxsize=256)
def product_sizes(
    h: int, d: int, d_k: int, values: int, *, per_head: bool = False
) -> dict[str, Any]:
    """Of a kernel that gathers keys of `d_k` columns a head, and values of `d`: `x_sizes`.

    Both are padded alike: where lanes hold other columns of the one than of the other, Triton 3.7
    takes products of weights and rows through shared memory. The mean over heads of values is a row
    of `d` columns. `values` and `per_head` as in `score_sizes`.
    """
    width = max(d, d_k)
    sizes = head_sizes(h, width, head_lanes(h, width, LANE_COLUMNS), LANE_COLUMNS)
    mean = {"d": d, "BLOCK_D": sizes["BLOCK_A"] // sizes["BLOCK_H"], "VEC_D": sizes["VEC_A"]}
    mean["N_D"] = sizes["N_A"] // sizes["N_H"]
    both = sizes | {"N_D": sizes["N_A"], "VEC_D": sizes["VEC_A"]}
    options = edges(both, values, scalars=sizes["BLOCK_H"] if per_head else 1)
    of_k = Sizes(options["sizes"], d_k=d_k)
    return options | {"sizes": of_k, "x_sizes": Sizes(of_k, d_k=d, **mean)}
