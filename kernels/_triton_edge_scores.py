"""The scores of a row: a sweep over the keys of a piece, for lse or the largest, and its join."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

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
from grand_fast.kernels._triton_weighting import (
    LOG2E,
    Scoring,
    load_edge_weight,
    load_slots,
    load_top,
    scores,
    squareplus,
)

SWEEP_VALUES = 32  # of a tile of keys per lane: a key is used at once, only m and l stay


@triton.jit
def online(m, l, s, mask_e, weighting, top):  # noqa: E741
    """One turn of the online sum of one group of heads.

    m, l [BLOCK_G, BLOCK_H], s [BLOCK_E, BLOCK_G, BLOCK_H]. Returns the new m and l, what old sums
    are multiplied by, and p. In a softmax m is the largest score, p = 2^(s − m); squareplus counts
    from `top` instead, and m stays 0.
    """
    if weighting.top is None:
        s = tl.where(mask_e[:, :, None], s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, 0))
        fade = tl.exp2(m - largest)
        p = tl.exp2(s - largest[None, :, :])
        return largest, l * fade + tl.sum(p, 0), fade, p
    else:
        p, _ = squareplus(s, top)
        p = tl.where(mask_e[:, :, None], p, 0.0)
        return m, l + tl.sum(p, 0), m, p


@triton.jit
def no_scores(weighting, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):
    """m and l before the first edge."""
    # Finite, so that a group without edges gives exp(m − m) = 1 and not NaN.
    least: tl.constexpr = -1e38 if weighting.top is None else 0.0
    m = ()
    l = ()  # noqa: E741
    for _ in tl.static_range(N_H):
        m = m + (tl.full([BLOCK_G, BLOCK_H], least, tl.float32),)
        l = l + (tl.zeros([BLOCK_G, BLOCK_H], tl.float32),)  # noqa: E741
    return m, l


@triton.jit
def join_groups(m, l):  # noqa: E741
    """m and l of one group of heads over all groups of lanes, each [BLOCK_H], and their shares."""
    largest = tl.max(m, 0)
    fade = tl.exp2(m - largest[None, :])
    return largest, tl.sum(l * fade, 0), fade


@triton.jit
def sweep_lse(
    q,
    k_ptr,
    weighting,
    top,
    col_ptr,
    slot_ptr,
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
    """m and l of the scores of a piece, see `online`, N_H of [BLOCK_H]; q comes scaled."""
    offs_e = edge_offsets(BLOCK_E, BLOCK_G)
    m, l = no_scores(weighting, BLOCK_G, BLOCK_H, N_H)  # noqa: E741
    j_next = tl.load(col_ptr + beg + offs_e, mask=offs_e < count, other=0)
    for e in range(0, count, BLOCK_E * BLOCK_G):
        mask_e = e + offs_e < count
        j = j_next
        behind = e + (BLOCK_E * BLOCK_G + offs_e)
        j_next = tl.load(col_ptr + beg + behind, mask=behind < count, other=0)
        k = gather_heads(k_ptr, j, mask_e, stride_k_n, H, d_k, BLOCK_A, VEC_A, BLOCK_K, N_A)
        slot = load_slots(slot_ptr, beg, e + offs_e, mask_e)
        w = load_edge_weight(weighting, slot, mask_e)
        s = scores(head_dot(k, q, BLOCK_H, N_H, VEC_A), w, weighting)
        new_m = ()
        new_l = ()
        for g in tl.static_range(N_H):
            m_g, l_g, _, _ = online(m[g], l[g], s[g], mask_e, weighting, top)
            new_m = new_m + (m_g,)
            new_l = new_l + (l_g,)
        m, l = new_m, new_l  # noqa: E741
    largest = ()
    total = ()
    for g in tl.static_range(N_H):
        m_g, l_g, _ = join_groups(m[g], l[g])
        largest = largest + (m_g,)
        total = total + (l_g,)
    return largest, total


@triton.jit
def log_sum(m, l):  # noqa: E741
    """lse in base e, of m in base 2; −∞ in a row without edges, and NaN stays NaN."""
    return tl.where(l == 0.0, float("-inf"), (m + tl.log2(l)) / LOG2E)


@triton.jit
def row_lse(m, l, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):  # noqa: E741
    """lse of a row, N_H of [BLOCK_H]: +∞ for a padded head, which then gets no weight."""
    lse = ()
    for g in tl.static_range(N_H):
        lse_g = tl.where(heads_of(g, BLOCK_H) < H, log_sum(m[g], l[g]), float("inf"))
        lse = lse + (lse_g,)
    return lse


@triton.jit
def store_lse(lse_ptr, lse, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):
    """Write lse of a row."""
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        tl.store(lse_ptr + offs_h, lse[g], mask=offs_h < H)


@triton.jit
def store_lse_part(
    part_m_ptr,
    part_l_ptr,
    pid_p,
    m,
    l,  # noqa: E741
    H: tl.constexpr,
    IS_TOP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    N_H: tl.constexpr,
):
    """Write m and l of a piece; the largest scores need no l, and nobody computes it then."""
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        tl.store(part_m_ptr + pid_p * H + offs_h, m[g], mask=offs_h < H)
        if not IS_TOP:
            tl.store(part_l_ptr + pid_p * H + offs_h, l[g], mask=offs_h < H)


@triton.jit
def store_top(top_ptr, m, count, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr):
    """Write the largest scores of a row of `count` edges, of m in base 2."""
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        tl.store(top_ptr + offs_h, tl.where(count == 0, float("-inf"), m[g] / LOG2E),
                 mask=offs_h < H)  # fmt: skip


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_fwd_lse_kernel(
    lse_ptr,
    part_m_ptr,
    part_l_ptr,
    q_ptr,
    k_ptr,
    weighting,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    HAS_WHOLE_ROWS: tl.constexpr,
    IS_TOP: tl.constexpr,
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
        scaled(q, scale), k_ptr, weighting, load_top(weighting), col_ptr, slot_ptr, beg, count,
        stride_k_n, H, d_k, BLOCK_H, BLOCK_K, BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G,
    )  # fmt: skip
    if HAS_WHOLE_ROWS:
        if pid_p < n_split:
            store_lse_part(part_m_ptr, part_l_ptr, pid_p, m, l, H, IS_TOP, BLOCK_H, N_H)
        else:
            if IS_TOP:
                store_top(lse_ptr + row * H, m, count, H, BLOCK_H, N_H)
            else:
                lse = row_lse(m, l, H, BLOCK_H, N_H)
                store_lse(lse_ptr + row * H, lse, H, BLOCK_H, N_H)
    else:
        store_lse_part(part_m_ptr, part_l_ptr, pid_p, m, l, H, IS_TOP, BLOCK_H, N_H)


@triton.jit
def _edge_attention_fwd_lse_join_kernel(
    lse_ptr,
    part_m_ptr,
    part_l_ptr,
    split_row_ptr,
    split_ptr_ptr,
    H: tl.constexpr,
    IS_TOP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    m = tl.load(part_m_ptr + first * H + offs_h, mask=mask_h, other=0.0)
    if IS_TOP:
        for p in range(first + 1, last):
            m = tl.maximum(m, tl.load(part_m_ptr + p * H + offs_h, mask=mask_h, other=0.0))
        tl.store(lse_ptr + row * H + offs_h, m / LOG2E, mask=mask_h)
    else:
        l = tl.load(part_l_ptr + first * H + offs_h, mask=mask_h, other=1.0)  # noqa: E741
        for p in range(first + 1, last):
            m_p = tl.load(part_m_ptr + p * H + offs_h, mask=mask_h, other=0.0)
            l_p = tl.load(part_l_ptr + p * H + offs_h, mask=mask_h, other=0.0)
            largest = tl.maximum(m, m_p)
            l = l * tl.exp2(m - largest) + l_p * tl.exp2(m_p - largest)  # noqa: E741
            m = largest
        tl.store(lse_ptr + row * H + offs_h, log_sum(m, l), mask=mask_h)


def write_lse(
    lse: Float[Tensor, "N H"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    scoring: Scoring,
    csr: Csr,
    whole_rows: bool,
    is_top: bool = False,
) -> None:
    """Write the rows of `lse` that have several pieces, or all; or the largest scores in its place.

    Rows are those of q. Scores of senders have them too, over Aᵀ: k and q then change places. The
    largest scores are to be asked of a softmax: in base 2.
    """
    work, (_, h, d_k) = csr.work, q.shape
    programs = work.piece_row.numel() if whole_rows else work.n_split
    if programs == 0:
        return
    sizes, blocks = score_sizes(h, d_k, q.dtype, SWEEP_VALUES)
    part_m = torch.empty((work.n_split, h), dtype=torch.float32, device=q.device)
    part_l = None if is_top else torch.empty_like(part_m)
    _edge_attention_fwd_lse_kernel[(programs,)](
        lse if whole_rows else None,
        part_m,
        part_l,
        q_ptr=q,
        k_ptr=k,
        weighting=scoring.weighting,
        col_ptr=csr.col,
        slot_ptr=scoring.slot(csr),
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        scale=scoring.dot_scale,
        H=h,
        d_k=d_k,
        HAS_WHOLE_ROWS=whole_rows,
        IS_TOP=is_top,
        **sizes,
        **blocks,
    )
    if work.n_split == 0:
        return
    _edge_attention_fwd_lse_join_kernel[(work.split_row.numel(),)](
        lse,
        part_m,
        part_l,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        IS_TOP=is_top,
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
