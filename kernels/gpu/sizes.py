"""Compile-time sizes of the tiles of a GPU kernel: lanes, chunks, heads, edges.

A row of a table is read by LANES lanes, VEC columns each at a time, in as many chunks as it takes;
the lanes that are left over read other rows, the groups: `gpu/tiles.py`.

Below, `most` is how many columns a lane may read at once: at most `load_columns`.
"""

import torch
import triton

_WARP_COLUMNS = 512  # a wider row is shared by more warps, at the price of a barrier a turn


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
    """Compile-time sizes of q or k: N_A chunks of BLOCK_A columns, N_H times BLOCK_H heads.

    A head has BLOCK_K columns; heads and columns come padded. It spans several chunks, or a chunk
    has several heads.
    """
    heads, block_k = int(triton.next_power_of_2(h)), int(triton.next_power_of_2(d_k))
    block_k = max(block_k, lanes // heads)
    vec = min(vector(d_k, most), heads * block_k // lanes, block_k)
    block_h = max(1, lanes * vec // block_k)
    return {
        "BLOCK_H": block_h,
        "BLOCK_K": block_k,
        "BLOCK_A": lanes * vec,
        "VEC_A": vec,
        "N_A": heads * block_k // (lanes * vec),
        "N_H": heads // block_h,
    }


def value_sizes(d: int, lanes: int, most: int) -> dict[str, int]:
    """Compile-time sizes of a row of `d` columns: N_D chunks of BLOCK_D."""
    vec = vector(d, most)
    return {"BLOCK_D": lanes * vec, "VEC_D": vec, "N_D": triton.cdiv(d, lanes * vec)}


def edges(sizes: dict[str, int], lanes: int, values: int, *, scalars: int = 1) -> dict[str, int]:
    """Edges that a program gathers at a time, `[BLOCK_E, BLOCK_G]`, and its warps.

    Args:
        sizes: those of the tables, of `head_sizes` and `value_sizes`.
        lanes: that read one row; more than a warp's are of several warps.
        values: elements that a lane may hold of all tiles.
        scalars: numbers gathered per edge in one load next to the tables: 1, its index, or more.
    """
    warps = max(1, lanes // 32)
    groups = 32 * warps // lanes
    of_edge = sum(sizes.get(f"N_{t}", 0) * sizes.get(f"VEC_{t}", 0) for t in "AD")
    # A load of one scalar per lane or more gets a layout of its own, and drags the scores into it
    # through shared memory: stay below.
    most = min(values // of_edge, 16 * warps // (groups * scalars))
    return {"BLOCK_E": 1 << max(0, most.bit_length() - 1), "BLOCK_G": groups, "num_warps": warps}


def score_sizes(
    h: int, d_k: int, dtype: torch.dtype, values: int, *, per_head: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time sizes and warps of a kernel that gathers keys alone, or queries.

    `values` as in `edges`; with `per_head`, numbers of every head are gathered beside.
    """
    most = load_columns(dtype)
    lanes = head_lanes(h, d_k, most)
    sizes = head_sizes(h, d_k, lanes, most)
    scalars = sizes["BLOCK_H"] if per_head else 1
    return sizes, edges(sizes, lanes, values, scalars=scalars)
