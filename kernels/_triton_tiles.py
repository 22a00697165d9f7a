"""Tiles of gathered rows: their sizes, and the jit helpers that load and sum them.

A program gathers rows of a table as tiles `[BLOCK_E, BLOCK_G, columns]`, edges first: Triton hands
out lanes from the last axis and the left-over lanes to the groups, so edges stay in registers and a
sum over them needs no shuffle. The groups are added up once, at the end.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import torch
import triton
import triton.language as tl

_WARP_BYTES = 32 * 16  # what one warp reads with one 128-bit load per lane
_WARP_COLUMNS = 512  # a wider row is shared by more warps, at the price of a barrier a turn


def row_warps(width: int) -> int:
    """Warps that share a row of `width` columns."""
    return min(8, max(1, width // _WARP_COLUMNS))


def tile(
    score_columns: int, value_columns: int, dtype: torch.dtype, values: int, *, scalars: int = 1
) -> dict[str, int]:
    """Edges that a program gathers at a time, `[BLOCK_E, BLOCK_G]`, and its warps.

    Args:
        score_columns, value_columns: width of the two tables, powers of two; equal if there is
            but one. `value_width` keeps the second at least as wide as the lanes of the first.
        dtype: that of the tables.
        values: elements of the wider tile, per warp.
        scalars: numbers gathered per edge next to the tables: its index, or lse of every head.
    """
    width = max(score_columns, value_columns)
    warps = row_warps(width)
    lanes = min(32, max(1, score_columns * dtype.itemsize // 16))
    groups = min(32 // lanes, max(1, 2 * values * warps // width))
    edges = values * warps // (width * groups)
    # A load of one scalar per lane or more gets a layout of its own, and drags the scores into it
    # through shared memory: stay below.
    edges = min(edges, 16 * warps // (groups * scalars))
    return {"BLOCK_E": max(1, edges), "BLOCK_G": groups, "num_warps": warps}


def value_width(d: int, score_columns: int, dtype: torch.dtype) -> int:
    """Columns of the value tile: `d` up to a power of two, and no fewer lanes than the scores.

    With fewer lanes Triton would spread edges over the lanes that are left, and every sum over
    edges would become shuffles.
    """
    narrowest = min(score_columns, _WARP_BYTES // dtype.itemsize)
    return max(int(triton.next_power_of_2(d)), narrowest)


def head_widths(h: int, d_k: int) -> dict[str, int]:
    """Heads and channels of a head, each up to a power of two."""
    return {"BLOCK_H": triton.next_power_of_2(h), "BLOCK_K": triton.next_power_of_2(d_k)}


def tiles(
    d: int, h: int, d_k: int, dtype: torch.dtype, values: int, *, scalars: int = 1
) -> dict[str, int]:
    """Compile-time sizes and warps of a kernel that gathers scores and values; as in `tile`."""
    widths = head_widths(h, d_k)
    columns = widths["BLOCK_H"] * widths["BLOCK_K"]
    block_d = value_width(d, columns, dtype)
    blocks = tile(columns, block_d, dtype, values, scalars=scalars)
    return {"BLOCK_D": block_d, **widths, **blocks}


@triton.jit
def load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr):
    """Row and first slot of a piece, in 64 bits: addresses are made of them; and its edges."""
    row = tl.load(piece_row_ptr + pid_p).to(tl.int64)
    beg = tl.load(piece_beg_ptr + pid_p).to(tl.int64)
    end = tl.load(piece_end_ptr + pid_p).to(tl.int64)
    return row, beg, (end - beg).to(tl.int32)


@triton.jit
def edge_offsets(BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr):
    """Slots of one turn, counted from its first: [BLOCK_E, BLOCK_G]."""
    return tl.arange(0, BLOCK_E)[:, None] * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]


@triton.jit
def head_columns(H: tl.constexpr, d_k: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Offsets and mask of a row of q or k, laid out as padded heads: [BLOCK_H · BLOCK_K]."""
    c = tl.arange(0, BLOCK_H * BLOCK_K)
    if d_k == BLOCK_K:
        offs, mask = c, c < H * d_k
    else:
        offs = (c // BLOCK_K) * d_k + c % BLOCK_K
        mask = (c // BLOCK_K < H) & (c % BLOCK_K < d_k)
    return offs, mask


@triton.jit
def gather(table_ptr, index, mask_e, offs, mask, stride: tl.constexpr):
    """Rows of a table, float32 [BLOCK_E, BLOCK_G, columns]; zero where either mask is off."""
    at = table_ptr + index[:, :, None].to(tl.int64) * stride + offs
    return tl.load(at, mask=mask_e[:, :, None] & mask, other=0.0).to(tl.float32)


@triton.jit
def by_head(a, BLOCK_H: tl.constexpr):
    """[BLOCK_E, BLOCK_G, BLOCK_H · BLOCK_K] → [BLOCK_E, BLOCK_G, BLOCK_H, BLOCK_K]."""
    return tl.reshape(a, [a.shape[0], a.shape[1], BLOCK_H, a.shape[2] // BLOCK_H])


@triton.jit
def edge_dot(a, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sum over the columns, [BLOCK_E, BLOCK_G, 1].

    Through the shape of the scores where the widths agree: the result then has their layout, and
    meets them without a trip through shared memory.
    """
    if a.shape[2] == BLOCK_H * BLOCK_K:
        t = tl.sum(tl.sum(by_head(a, BLOCK_H), 3), 2)
    else:
        t = tl.sum(a, 2)
    return t[:, :, None]


@triton.jit
def join(part_ptr, first, last, offs, mask, stride: tl.constexpr):
    """Σ of the partial sums of pieces `first ≤ piece < last`, in order: [columns]."""
    offs_p = tl.arange(0, 8)  # pieces in flight
    total = tl.zeros(offs.shape, tl.float32)
    for p in range(first, last, 8):
        mask_p = p + offs_p < last
        at = part_ptr + (p + offs_p)[:, None] * stride + offs
        total += tl.sum(tl.load(at, mask=mask_p[:, None] & mask, other=0.0), 0)
    return total
