"""What two or more GPU kernels share: the work list of a graph, tile sizes, and jit helpers.

Every kernel has one shape. A program takes a piece: at most `PIECE_EDGES` edges of one row. It
gathers rows of a table as tiles `[BLOCK_E, BLOCK_G, columns]`, edges first: Triton hands out lanes
from the last axis and the left-over lanes to the groups, so edges stay in registers and a sum over
them needs no shuffle. The groups are added up once, at the end. A row of several pieces leaves
partial sums, which a join kernel adds in the order of its pieces: one writer per element, bitwise
repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import functools
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from grand_fast.kernels._csr import Add, Csr

P = ParamSpec("P")
R = TypeVar("R")

PIECE_EDGES = 256  # a hub of 13 000 edges takes 51 programs; its rounds of loads no longer show
_WARP_BYTES = 32 * 16  # what one warp reads with one 128-bit load per lane
_WARP_COLUMNS = 512  # a wider row is shared by more warps, at the price of a barrier a turn


class Work(NamedTuple):
    """The pieces of one CSR view; those of split rows first, in order, then one per other row.

    piece_row, piece_beg, piece_end: [P], row of a piece and its slots `beg ≤ slot < end`.
    split_row: [S], rows of more than one piece; split_ptr: [S+1], their pieces.
    n_split:   number of pieces that belong to split rows.
    """

    piece_row: Tensor
    piece_beg: Tensor
    piece_end: Tensor
    split_row: Tensor
    split_ptr: Tensor
    n_split: int


def plan(csr: Csr, order: Callable[[], Tensor | None], *, piece_edges: int = PIECE_EDGES) -> Csr:
    """The view with its work list. `order` is for the CPU: a GPU starts programs as it likes."""
    return csr._replace(work=cut(csr.rowptr, piece_edges=piece_edges))


def cut(rowptr: Tensor, *, piece_edges: int = PIECE_EDGES) -> Work:
    """Cut the rows of a CSR view into pieces of at most `piece_edges` edges; once per view."""
    index = rowptr.dtype
    degree = rowptr.diff()
    # a row without edges is one empty piece: somebody has to write its output
    pieces = ((degree + piece_edges - 1) // piece_edges).clamp(min=1)
    split_row = (pieces > 1).nonzero().flatten()
    whole_row = (pieces == 1).nonzero().flatten()
    count = pieces[split_row]
    split_ptr = torch.zeros(split_row.numel() + 1, dtype=torch.int64, device=rowptr.device)
    split_ptr[1:] = count.cumsum(0)
    n_split = int(split_ptr[-1])
    piece_row = torch.cat([split_row.repeat_interleave(count, output_size=n_split), whole_row])
    before = torch.zeros_like(piece_row)  # pieces of the same row before this one
    first = split_ptr[:-1].repeat_interleave(count, output_size=n_split)
    before[:n_split] = torch.arange(n_split, device=rowptr.device) - first
    piece_beg = rowptr[piece_row] + before * piece_edges
    piece_end = torch.minimum(piece_beg + piece_edges, rowptr[piece_row + 1])
    return Work(
        piece_row=piece_row.to(index),
        piece_beg=piece_beg.to(index),
        piece_end=piece_end.to(index),
        split_row=split_row.to(index),
        split_ptr=split_ptr.to(index),
        n_split=n_split,
    )


def launcher(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Run a launcher on the device of its first argument, which need not be the current one."""

    @functools.wraps(function)
    def call(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return function(first, *args, **kwargs)

    return call


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
    warps = min(8, max(1, width // _WARP_COLUMNS))
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


@triton.jit
def load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr):
    """Row and slots `beg ≤ slot < end` of a piece, in 64 bits: every address is made of them."""
    row = tl.load(piece_row_ptr + pid_p).to(tl.int64)
    beg = tl.load(piece_beg_ptr + pid_p).to(tl.int64)
    end = tl.load(piece_end_ptr + pid_p).to(tl.int64)
    return row, beg, end


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
    at = table_ptr + index[:, :, None] * stride + offs
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
def sweep_lse(
    q,
    k_ptr,
    col_ptr,
    beg,
    end,
    offs_a,
    mask_a,
    stride_k_n: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Maximum m of the scores of a piece and l = Σ exp(s − m), each [BLOCK_H]; q comes scaled."""
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    # Finite, so that a group without edges gives exp(m − m) = 1 and not NaN.
    m = tl.full([BLOCK_G, BLOCK_H], -1e38, tl.float32)
    l = tl.zeros([BLOCK_G, BLOCK_H], tl.float32)  # noqa: E741
    for e in range(beg, end, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < end
        j = tl.load(col_ptr + e + offs_e, mask=mask_e, other=0).to(tl.int64)
        k = gather(k_ptr, j, mask_e, offs_a, mask_a, stride_k_n)
        s = tl.where(mask_e[:, :, None], tl.sum(by_head(k * q, BLOCK_H), 3), float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        l = l * tl.exp(m - top) + tl.sum(tl.exp(s - top[None, :, :]), 0)  # noqa: E741
        m = top
    top = tl.max(m, 0)
    return top, tl.sum(l * tl.exp(m - top[None, :]), 0)


@triton.jit
def log_sum(m, l):  # noqa: E741
    """lse = m + log l; −inf in a row without edges, and NaN stays NaN."""
    return tl.where(l == 0.0, float("-inf"), m + tl.log(l))


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


@triton.jit
def store_diffusion(
    f_ptr,
    ax,
    x_ptr,
    alpha_ptr,
    beta_ptr,
    x0_ptr,
    row,
    stride_f_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_x0_n: tl.constexpr,
    d: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """f = alpha (ax − x) + beta x0 of one row, ax [BLOCK_D]; ax − x alone unless IS_SCALED."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    f = ax - tl.load(x_ptr + row * stride_x_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if IS_SCALED:
        f *= tl.load(alpha_ptr + offs_d, mask=mask_d, other=0.0)
    if HAS_SOURCE:
        x0 = tl.load(x0_ptr + row * stride_x0_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        f += tl.load(beta_ptr + offs_d, mask=mask_d, other=0.0) * x0
    tl.store(f_ptr + row * stride_f_n + offs_d, f.to(f_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def store_dq(
    dq_ptr,
    delta_ptr,
    sum_p,
    sum_pt,
    sum_pk,
    sum_ptk,
    t0,
    row,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq = scale (Σ p t k − Delta Σ p k) of one row, and Delta = Σ p t; sums over its edges.

    sum_p, sum_pt [BLOCK_H]; sum_pk, sum_ptk [BLOCK_H · BLOCK_K]. t is counted from t0, which
    cancels in dq. The difference of the two sums can be small against them: that Σ p is only 1 up
    to the rounding of lse would show, so all are divided by it.
    """
    offs_a, mask_a = head_columns(H, d_k, BLOCK_H, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    over_p = tl.where(sum_p > 0.0, 1.0 / sum_p, 0.0)  # a row without edges: dq = 0
    delta = sum_pt * over_p
    difference = tl.reshape(sum_ptk, [BLOCK_H, BLOCK_K]) - delta[:, None] * tl.reshape(
        sum_pk, [BLOCK_H, BLOCK_K]
    )
    dq = tl.reshape(scale * over_p[:, None] * difference, [BLOCK_H * BLOCK_K])
    at = dq_ptr + row * (H * d_k) + offs_a
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=mask_a)
    tl.store(delta_ptr + row * H + offs_h, delta + t0, mask=offs_h < H)


def add_in_place(f: Tensor, add: Add) -> None:
    """`f += Σ_s c_s y_s`, in passes of their own, each rounded to the dtype of `f`."""
    for scale, y in add:
        f.add_(y, alpha=scale)
