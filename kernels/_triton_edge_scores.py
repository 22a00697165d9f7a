"""The softmax of a row's scores: a sweep over the keys of a piece, and lse of split rows."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Csr
from grand_fast.kernels._triton_tiles import (
    edge_offsets,
    edges,
    gather_heads,
    head_dot,
    head_lanes,
    head_sizes,
    heads_of,
    load_columns,
    load_heads,
    load_piece,
    scaled,
)

SWEEP_VALUES = 32  # of a tile of keys per lane: a key is used at once, only m and l stay
# Kernels scale their scores by it: 2ˢ is one instruction, eˢ five.
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def online(m, l, s):  # noqa: E741
    """One turn of the online softmax of one group of heads.

    m, l [BLOCK_G, BLOCK_H], s [BLOCK_E, BLOCK_G, BLOCK_H] in base 2. Returns the new m and l, what
    old sums are multiplied by, and 2^(s − m).
    """
    top = tl.maximum(m, tl.max(s, 0))
    fade = tl.exp2(m - top)
    p = tl.exp2(s - top[None, :, :])
    return top, l * fade + tl.sum(p, 0), fade, p


@triton.jit
def no_scores(BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):
    """m and l before the first edge."""
    m = ()
    l = ()  # noqa: E741
    for _ in tl.static_range(N_H):
        # Finite, so that a group without edges gives exp(m − m) = 1 and not NaN.
        m = m + (tl.full([BLOCK_G, BLOCK_H], -1e38, tl.float32),)
        l = l + (tl.zeros([BLOCK_G, BLOCK_H], tl.float32),)  # noqa: E741
    return m, l


@triton.jit
def join_groups(m, l):  # noqa: E741
    """m and l of one group of heads over all groups of lanes, each [BLOCK_H], and their shares."""
    top = tl.max(m, 0)
    fade = tl.exp2(m - top[None, :])
    return top, tl.sum(l * fade, 0), fade


@triton.jit
def sweep_lse(
    q,
    k_ptr,
    col_ptr,
    beg,
    count,
    stride_k_n: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Maximum m of the scores of a piece and l = Σ 2^(s − m), N_H of [BLOCK_H]; q comes scaled."""
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    m, l = no_scores(BLOCK_G, BLOCK_H, N_H)  # noqa: E741
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = tl.load(col_ptr + beg + (e + offs_e), mask=mask_e, other=0)
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        s = head_dot(k, q, BLOCK_H, N_H, VEC_A)
        new_m = ()
        new_l = ()
        for g in tl.static_range(N_H):
            s_g = tl.where(mask_e[:, :, None], s[g], float("-inf"))
            m_g, l_g, _, _ = online(m[g], l[g], s_g)
            new_m = new_m + (m_g,)
            new_l = new_l + (l_g,)
        m, l = new_m, new_l  # noqa: E741
    top = ()
    total = ()
    for g in tl.static_range(N_H):
        m_g, l_g, _ = join_groups(m[g], l[g])
        top = top + (m_g,)
        total = total + (l_g,)
    return top, total


@triton.jit
def log_sum(m, l):  # noqa: E741
    """lse in base e, of scores in base 2; −∞ in a row without edges, and NaN stays NaN."""
    return tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)


@triton.jit
def weight(s, lse):
    """exp(s − lse) of scores in base 2 and lse in base e."""
    return tl.exp2(s - lse * LOG2E)


@triton.jit
def store_lse(
    lse_ptr,
    m,
    l,  # noqa: E741
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    N_H: tl.constexpr,
):
    """Write lse of a row, and return it: +∞ for a padded head, which then gets no weight."""
    lse = ()
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        lse_g = tl.where(offs_h < H, log_sum(m[g], l[g]), float("inf"))
        tl.store(lse_ptr + offs_h, lse_g, mask=offs_h < H)
        lse = lse + (lse_g,)
    return lse


@triton.jit
def _edge_attention_fwd_lse_kernel(
    part_m_ptr,
    part_l_ptr,
    q_ptr,
    k_ptr,
    col_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr)
    q = load_heads(q_ptr + row * stride_q_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
    m, l = sweep_lse(  # noqa: E741
        scaled(q, scale), k_ptr, col_ptr, beg, count, stride_k_n, H, d_k, BLOCK_H, BLOCK_K, BLOCK_A,
        VEC_A, N_A, N_H, BLOCK_E, BLOCK_G,
    )  # fmt: skip
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        tl.store(part_m_ptr + pid_p * H + offs_h, m[g], mask=offs_h < H)
        tl.store(part_l_ptr + pid_p * H + offs_h, l[g], mask=offs_h < H)


@triton.jit
def _edge_attention_fwd_lse_join_kernel(
    lse_ptr,
    part_m_ptr,
    part_l_ptr,
    split_row_ptr,
    split_ptr_ptr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    m = tl.load(part_m_ptr + first * H + offs_h, mask=mask_h, other=0.0)
    l = tl.load(part_l_ptr + first * H + offs_h, mask=mask_h, other=1.0)  # noqa: E741
    for p in range(first + 1, last):
        m_p = tl.load(part_m_ptr + p * H + offs_h, mask=mask_h, other=0.0)
        l_p = tl.load(part_l_ptr + p * H + offs_h, mask=mask_h, other=0.0)
        top = tl.maximum(m, m_p)
        l = l * tl.exp2(m - top) + l_p * tl.exp2(m_p - top)  # noqa: E741
        m = top
    tl.store(lse_ptr + row * H + offs_h, log_sum(m, l), mask=mask_h)


def score_scale(d_k: int) -> float:
    """Factor of <q, k> that gives scores in base 2."""
    return LOG2E.value / math.sqrt(d_k)  # type: ignore[no-any-return]


def split_lse(
    lse: Float[Tensor, "N H"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    csr: Csr,
) -> None:
    """Write the rows of `lse` that have several pieces."""
    work, (_, h, d_k) = csr.work, q.shape
    if work.n_split == 0:
        return
    sizes, blocks = score_sizes(h, d_k, q.dtype, SWEEP_VALUES)
    part_m = torch.empty((work.n_split, h), dtype=torch.float32, device=q.device)
    part_l = torch.empty((work.n_split, h), dtype=torch.float32, device=q.device)
    _edge_attention_fwd_lse_kernel[(work.n_split,)](
        part_m,
        part_l,
        q,
        k_ptr=k,
        col_ptr=csr.col,
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=score_scale(d_k),
        H=h,
        d_k=d_k,
        **sizes,
        **blocks,
    )
    _edge_attention_fwd_lse_join_kernel[(work.split_row.numel(),)](
        lse,
        part_m,
        part_l,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        BLOCK_H=triton.next_power_of_2(h),
        num_warps=1,
    )


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
