"""What normalises a row, or its largest scores, by a kernel of its own: a sweep over the keys.

Rows of several pieces need it before a weight can be computed; every row, where senders normalise.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.scores import norm_of, store_norm, sweep_scores
from grand_fast.kernels.gpu.attention.weighting import LOG2E, KernelWeighting, load_top
from grand_fast.kernels.gpu.sizes import edges, score_sizes
from grand_fast.kernels.gpu.tiles import heads_of, load_heads, load_piece

SWEEP_VALUES = 32  # of a tile of keys per lane: a key is used at once, only m and l stay


@triton.jit
def store_norm_part(
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
def _edge_attention_fwd_norm_kernel(
    norm_ptr,
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
    m, l = sweep_scores(  # noqa: E741
        q, k_ptr, weighting, load_top(weighting), col_ptr, slot_ptr, beg, count, stride_k_n, H, d_k,
        BLOCK_H, BLOCK_K, BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G,
    )  # fmt: skip
    if HAS_WHOLE_ROWS:
        if pid_p < n_split:
            store_norm_part(part_m_ptr, part_l_ptr, pid_p, m, l, H, IS_TOP, BLOCK_H, N_H)
        else:
            if IS_TOP:
                store_top(norm_ptr + row * H, m, count, H, BLOCK_H, N_H)
            else:
                shift, inverse = norm_of(m, l, H, BLOCK_H, N_H)
                store_norm(norm_ptr + row * (2 * H), shift, inverse, weighting, H, BLOCK_H, N_H)
    else:
        store_norm_part(part_m_ptr, part_l_ptr, pid_p, m, l, H, IS_TOP, BLOCK_H, N_H)


@triton.jit
def _edge_attention_fwd_norm_join_kernel(
    norm_ptr,
    part_m_ptr,
    part_l_ptr,
    split_row_ptr,
    split_ptr_ptr,
    weighting,
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
        tl.store(norm_ptr + row * H + offs_h, m / LOG2E, mask=mask_h)
    else:
        l = tl.load(part_l_ptr + first * H + offs_h, mask=mask_h, other=1.0)  # noqa: E741
        for p in range(first + 1, last):
            m_p = tl.load(part_m_ptr + p * H + offs_h, mask=mask_h, other=0.0)
            l_p = tl.load(part_l_ptr + p * H + offs_h, mask=mask_h, other=0.0)
            largest = tl.maximum(m, m_p)
            l = l * tl.exp2(m - largest) + l_p * tl.exp2(m_p - largest)  # noqa: E741
            m = largest
        at = norm_ptr + row * (2 * H)
        store_norm(at, (m,), (1.0 / l,), weighting, H, BLOCK_H, 1)


def write_norm(
    norm: Float[Tensor, "N 2 H"] | Float[Tensor, "N H"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: KernelWeighting,
    csr: Csr,
    whole_rows: bool,
    sizes: dict[str, int] | None = None,
    is_top: bool = False,
) -> None:
    """Write the rows of `norm` that have several pieces, or all; or the largest scores `[N, H]`.

    Rows are those of q. Scores of senders have them too, over Aᵀ: k and q then change places. The
    largest scores are to be asked of a softmax: in base 2. sizes: of the tiles of q and k in the
    kernel that is to use it, so that both get the same scores to the last bit.
    """
    work, (_, h, d_k) = csr.work, q.shape
    programs = work.piece_row.numel() if whole_rows else work.n_split
    if programs == 0:
        return
    if sizes is None:
        sizes, blocks = score_sizes(h, d_k, q.dtype, SWEEP_VALUES)
    else:
        blocks = edges(sizes, sizes["BLOCK_A"] // sizes["VEC_A"], SWEEP_VALUES)
    part_m = torch.empty((work.n_split, h), dtype=torch.float32, device=q.device)
    part_l = None if is_top else torch.empty_like(part_m)
    _edge_attention_fwd_norm_kernel[(programs,)](
        norm if whole_rows else None,
        part_m,
        part_l,
        q_ptr=q,
        k_ptr=k,
        weighting=weighting,
        col_ptr=csr.col,
        slot_ptr=weighting.slot(csr),
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        H=h,
        d_k=d_k,
        HAS_WHOLE_ROWS=whole_rows,
        IS_TOP=is_top,
        **sizes,
        **blocks,
    )
    if work.n_split == 0:
        return
    _edge_attention_fwd_norm_join_kernel[(work.split_row.numel(),)](
        norm,
        part_m,
        part_l,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        weighting=weighting,
        H=h,
        IS_TOP=is_top,
        BLOCK_H=triton.next_power_of_2(h),
        num_warps=1,
    )
