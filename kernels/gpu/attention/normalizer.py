"""What normalises a row, or its largest scores: a sweep over the keys of its pieces.

`norm` of a row is its shift and 1 / Σ p, of each head. A forward finds it on its way, where a row
has one piece and receivers normalise; else a kernel of its own does, before any weight is computed.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.online_softmax import join_heads, no_scores, online_heads
from grand_fast.kernels.gpu.attention.scores import (
    LOG2E,
    KernelWeighting,
    edge_scores,
    in_base_2,
    load_top,
)
from grand_fast.kernels.gpu.sizes import Sizes, score_sizes
from grand_fast.kernels.gpu.tiles import (
    add_edge_rows,
    edge_offsets,
    gather_per_head,
    gather_rows,
    heads_of,
    load_columns,
    load_per_head,
    load_piece,
    load_row,
    load_slots,
    load_split,
    turn_columns,
)

SWEEP_VALUES = 32  # of a tile of keys per lane: a key is used at once, only m and l stay


@triton.jit
def sweep_scores(
    q, k_ptr, weighting, top, view, beg, count, stride_k_n: tl.constexpr, sizes: tl.constexpr
):
    """m and l of the scores of a piece, see `online`, N_H of [BLOCK_H]."""
    offs_e = edge_offsets(sizes)
    m, l = no_scores(weighting, sizes)  # noqa: E741
    j_next = load_columns(view, beg, offs_e, count)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        mask_e = e + offs_e < count
        j, j_next = turn_columns(j_next, view, beg, e, offs_e, count, True, sizes)
        k = gather_rows("heads", k_ptr, j, mask_e, stride_k_n, sizes)
        slot = load_slots(view, beg, e + offs_e, mask_e)
        k, q_e = add_edge_rows(k, q, weighting.edge_key, slot, mask_e, view, sizes)
        s = edge_scores(k, q_e, slot, mask_e, weighting, sizes)[2]
        m, l, _, _ = online_heads(m, l, s, mask_e, weighting, top)  # noqa: E741
    largest, total, _ = join_heads(m, l)
    return largest, total


@triton.jit
def norm_of(m, l, sizes: tl.constexpr):  # noqa: E741
    """Shift in base 2 and 1 / Σ p of m and l, N_H of [BLOCK_H] each.

    A padded head has the shift +∞ and 0: it gets no weight, whatever its scores are.
    """
    shift = ()
    inverse = ()
    for g in tl.static_range(sizes.N_H):
        _, is_head = heads_of(g, sizes)
        shift = shift + (tl.where(is_head, m[g], float("inf")),)
        inverse = inverse + (tl.where(is_head, 1.0 / l[g], 0.0),)
    return shift, inverse


@triton.jit
def store_norm(norm_ptr, row, shift, inverse, weighting, sizes: tl.constexpr):
    """Write a row of `norm`. Its shift is in base e: rounded, so that 1 / Σ p becomes another."""
    for g in tl.static_range(sizes.N_H):
        offs_h, mask_h = heads_of(g, sizes)
        natural = shift[g]
        total = inverse[g]
        if weighting.top is None:
            is_empty = total == float("inf")
            natural = tl.where(is_empty, float("-inf"), shift[g] / LOG2E)
            # as whoever loads it has it
            total *= tl.exp2(tl.where(is_empty, 0.0, in_base_2(natural, weighting) - shift[g]))
        at = norm_ptr + row * (2 * sizes.H) + offs_h
        tl.store(at, natural, mask=mask_h)
        tl.store(at + sizes.H, total, mask=mask_h)


@triton.jit
def load_norm(norm_ptr, row, weighting, sizes: tl.constexpr):
    """A row of `norm`, as `norm_of` gives it."""
    at = norm_ptr + row * (2 * sizes.H)
    natural = load_per_head(at, float("inf"), sizes)
    inverse = load_per_head(at + sizes.H, 0.0, sizes)
    shift = ()
    for g in tl.static_range(sizes.N_H):
        shift = shift + (in_base_2(natural[g], weighting),)
    return shift, inverse


@triton.jit
def gather_norm(norm_ptr, index, mask_e, weighting, HAS_DELTA: tl.constexpr, sizes: tl.constexpr):
    """Rows of `norm`, N_H of [BLOCK_E, BLOCK_G, BLOCK_H] each: shift, 1 / Σ p, and Delta or ().

    `weight` is 0 where there is no edge. With Delta in its rows the table is the normalised side's,
    whose shift is in base 2 already.
    """
    rows = norm_ptr + index[:, :, None].to(tl.int64) * ((2 + HAS_DELTA) * sizes.H)
    shift = gather_per_head(rows, 0, mask_e, float("inf"), sizes)
    inverse = gather_per_head(rows, sizes.H, mask_e, 0.0, sizes)
    delta = ()
    if HAS_DELTA:
        delta = gather_per_head(rows, 2 * sizes.H, mask_e, 0.0, sizes)
    else:
        natural = shift
        shift = ()
        for g in tl.static_range(sizes.N_H):
            shift = shift + (in_base_2(natural[g], weighting),)
    return shift, inverse, delta


@triton.jit
def store_part(part_ptr, pid_p, m, l, IS_TOP: tl.constexpr, sizes: tl.constexpr):  # noqa: E741
    """Write m and l of a piece; the largest scores need no l, and nobody computes it then."""
    for g in tl.static_range(sizes.N_H):
        offs_h, mask_h = heads_of(g, sizes)
        at = part_ptr + pid_p * (2 * sizes.H) + offs_h
        tl.store(at, m[g], mask=mask_h)
        if not IS_TOP:
            tl.store(at + sizes.H, l[g], mask=mask_h)


@triton.jit
def store_top(top_ptr, row, m, count, sizes: tl.constexpr):
    """Write the largest scores of a row of `count` edges, of m in base 2."""
    for g in tl.static_range(sizes.N_H):
        offs_h, mask_h = heads_of(g, sizes)
        top = tl.where(count == 0, float("-inf"), m[g] / LOG2E)
        tl.store(top_ptr + row * sizes.H + offs_h, top, mask=mask_h)


@triton.jit(do_not_specialize=["n_split"])
def _edge_attention_fwd_norm_kernel(
    norm_ptr, part_ptr, q_ptr, k_ptr, weighting, view, n_split, stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr, HAS_WHOLE_ROWS: tl.constexpr, IS_TOP: tl.constexpr,
    sizes: tl.constexpr,
):  # fmt: skip
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    q = load_row("heads", q_ptr + row * stride_q_n, sizes)
    top = load_top(weighting)
    m, l = sweep_scores(  # noqa: E741
        q, k_ptr, weighting, top, view, beg, count, stride_k_n, sizes
    )
    if HAS_WHOLE_ROWS:
        if pid_p < n_split:
            store_part(part_ptr, pid_p, m, l, IS_TOP, sizes)
        else:
            if IS_TOP:
                store_top(norm_ptr, row, m, count, sizes)
            else:
                shift, inverse = norm_of(m, l, sizes)
                store_norm(norm_ptr, row, shift, inverse, weighting, sizes)
    else:
        store_part(part_ptr, pid_p, m, l, IS_TOP, sizes)


@triton.jit
def _edge_attention_fwd_norm_join_kernel(
    norm_ptr, part_ptr, split_row_ptr, split_ptr_ptr, weighting, IS_TOP: tl.constexpr,
    sizes: tl.constexpr,
):  # fmt: skip
    row, first, last = load_split(split_row_ptr, split_ptr_ptr)
    offs_h, mask_h = heads_of(0, sizes)
    part_ptr += offs_h
    m = tl.load(part_ptr + first * (2 * sizes.H), mask=mask_h, other=0.0)
    if IS_TOP:
        for p in range(first + 1, last):
            m = tl.maximum(m, tl.load(part_ptr + p * (2 * sizes.H), mask=mask_h, other=0.0))
        tl.store(norm_ptr + row * sizes.H + offs_h, m / LOG2E, mask=mask_h)
    else:
        l = tl.load(  # noqa: E741
            part_ptr + first * (2 * sizes.H) + sizes.H, mask=mask_h, other=1.0
        )
        for p in range(first + 1, last):
            m_p = tl.load(part_ptr + p * (2 * sizes.H), mask=mask_h, other=0.0)
            l_p = tl.load(part_ptr + p * (2 * sizes.H) + sizes.H, mask=mask_h, other=0.0)
            largest = tl.maximum(m, m_p)
            l = l * tl.exp2(m - largest) + l_p * tl.exp2(m_p - largest)  # noqa: E741
            m = largest
        store_norm(norm_ptr, row, (m,), (1.0 / l,), weighting, sizes)


def write_norm(
    norm: Float[Tensor, "N 2 H"] | Float[Tensor, "N H"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: KernelWeighting,
    csr: Csr,
    whole_rows: bool,
    options: dict[str, Any] | None = None,
    is_top: bool = False,
) -> None:
    """Write the rows of `norm` that have several pieces, or all; or the largest scores `[N, H]`.

    Rows are those of q. Scores of senders have them too, over Aᵀ: k and q then change places. The
    largest scores are to be asked of a softmax: in base 2. options: of tiles of q and k as in the
    kernel that is to use it, so that both get the same scores to the last bit.
    """
    work, (_, h, d_k) = csr.work, q.shape
    programs = work.piece_row.numel() if whole_rows else work.n_split
    if programs == 0:
        return
    part = torch.empty((work.n_split, 2, h), dtype=torch.float32, device=q.device)
    _edge_attention_fwd_norm_kernel[(programs,)](
        norm, part, q, k_ptr=k, weighting=weighting, view=weighting.view(csr),
        n_split=work.n_split, stride_q_n=q.stride(0), stride_k_n=k.stride(0),
        HAS_WHOLE_ROWS=whole_rows, IS_TOP=is_top,
        **(options or score_sizes(h, d_k, q.dtype, SWEEP_VALUES)),
    )  # fmt: skip
    join_norm(norm, part, weighting=weighting, csr=csr, is_top=is_top)


def join_norm(
    norm: Float[Tensor, "N 2 H"] | Float[Tensor, "N H"], part: Float[Tensor, "pieces 2 H"], *,
    weighting: KernelWeighting, csr: Csr, is_top: bool = False,
) -> None:  # fmt: skip
    """Write the rows of `norm` that have several pieces, from what `store_part` left of these."""
    work, h = csr.work, part.shape[2]
    if work.n_split:
        sizes = Sizes(H=h, BLOCK_H=int(triton.next_power_of_2(h)), N_H=1)
        _edge_attention_fwd_norm_join_kernel[(work.split_row.numel(),)](
            norm, part, work.split_row, split_ptr_ptr=work.split_ptr, weighting=weighting,
            IS_TOP=is_top, sizes=sizes, num_warps=1,
        )  # fmt: skip
