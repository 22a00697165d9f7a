"""edge_softmax: a[e,h] = p(s[e,h]) / Σ p(s[e',h]) over the edges e' of e's receiver or sender

Work:     one program per piece of at most 256 edges of a group's row, in two kernels: `norm` by an
          online sum, and the weights.
Bytes:    4(N+1) + 2b·EH + 8NH, b bytes per element, if the second kernel finds the scores in cache;
          3b·EH instead of 2b·EH, and 8NH more, if not. Over the edges of senders, scores and
          weights are laid out in the order of the CSR of Aᵀ first: 4b·EH more.
Backward: ds = a ρ (t − Δ), Δ = Σ a t / Σ a over the group, t = da; two kernels that compute a
          again: the two sums, and ds. Saves s and norm.
Order:    one writer per output element; edges summed in CSR order, pieces of a hub in theirs:
          bitwise repeatable.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr, in_slots, in_view
from grand_fast.kernels.gpu.attention.backward_far_side import all_scores, join_rows
from grand_fast.kernels.gpu.attention.normalizer import (
    join_norm,
    load_norm,
    norm_of,
    store_norm,
    store_part,
)
from grand_fast.kernels.gpu.attention.online_softmax import join_heads, no_scores, online_heads
from grand_fast.kernels.gpu.attention.scores import (
    kernel_weighting,
    load_top,
    past_normalizer,
    weights,
)
from grand_fast.kernels.gpu.pieces import launcher, view_of
from grand_fast.kernels.gpu.sizes import Sizes
from grand_fast.kernels.gpu.sums import zeros
from grand_fast.kernels.gpu.tiles import (
    edge_offsets,
    gather_per_head,
    heads_of,
    load_per_head,
    load_piece,
    store_per_head,
)
from grand_fast.kernels.weighting import Weighting

# Numbers of each table that a lane has in flight. With fewer, 128 bits of a half type would be read
# by half of the lanes, and by the others once more.
_TURN = 8


@triton.jit
def table_rows(table_ptr, beg, offs, sizes: tl.constexpr):
    """The rows of a table `[E, H]` for a turn's edges."""
    return table_ptr + beg * sizes.H + offs[:, :, None] * sizes.H


@triton.jit
def load_table(table_ptr, beg, offs, count, sizes: tl.constexpr):
    """Numbers of a turn's edges and heads in float32, N_H of [BLOCK_E, BLOCK_G, BLOCK_H]."""
    given = gather_per_head(table_rows(table_ptr, beg, offs, sizes), 0, offs < count, 0.0, sizes)
    numbers = ()
    for g in tl.static_range(sizes.N_H):
        numbers = numbers + (given[g].to(tl.float32),)
    return numbers


@triton.jit(do_not_specialize=["n_split"])
def _edge_softmax_fwd_norm_kernel(
    norm_ptr, part_ptr, s_ptr, weighting, view, n_split, sizes: tl.constexpr
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    offs_e = edge_offsets(sizes)
    top = load_top(weighting)
    m, l = no_scores(weighting, sizes)  # noqa: E741
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        s = load_table(s_ptr, beg, e + offs_e, count, sizes)
        m, l, _, _ = online_heads(m, l, s, e + offs_e < count, weighting, top)  # noqa: E741
    largest, total, _ = join_heads(m, l)
    if pid_p < n_split:
        store_part(part_ptr, pid_p, largest, total, False, sizes)
    else:
        shift, inverse = norm_of(largest, total, sizes)
        store_norm(norm_ptr, row, shift, inverse, weighting, sizes)


@triton.jit
def _edge_softmax_fwd_kernel(a_ptr, s_ptr, norm_ptr, weighting, view, sizes: tl.constexpr):
    row, beg, count = load_piece(view, tl.program_id(0))
    offs_e = edge_offsets(sizes)
    top = load_top(weighting)
    shift, inverse = load_norm(norm_ptr, row, weighting, sizes)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        s = load_table(s_ptr, beg, e + offs_e, count, sizes)
        a = weights(s, shift, inverse, weighting, top)
        store_per_head(table_rows(a_ptr, beg, e + offs_e, sizes), a, e + offs_e < count, sizes)


@triton.jit(do_not_specialize=["n_split"])
def _edge_softmax_bwd_sums_kernel(
    sums_ptr, part_ptr, da_ptr, s_ptr, norm_ptr, weighting, view, n_split, sizes: tl.constexpr
):
    """Σ a t and Σ a, a row of `[2 H]`."""
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    offs_e = edge_offsets(sizes)
    top = load_top(weighting)
    shift, inverse = load_norm(norm_ptr, row, weighting, sizes)
    sum_at = zeros(sizes.N_H, sizes.BLOCK_H, sizes)
    sum_a = zeros(sizes.N_H, sizes.BLOCK_H, sizes)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        s = load_table(s_ptr, beg, e + offs_e, count, sizes)
        t = load_table(da_ptr, beg, e + offs_e, count, sizes)
        a = weights(s, shift, inverse, weighting, top)
        new_at = ()
        new_a = ()
        for g in tl.static_range(sizes.N_H):
            a_g = tl.where((e + offs_e < count)[:, :, None], a[g], 0.0)
            new_at = new_at + (sum_at[g] + tl.sum(a_g * t[g], 0),)
            new_a = new_a + (sum_a[g] + tl.sum(a_g, 0),)
        sum_at, sum_a = new_at, new_a
    row_ptr = sums_ptr + row * (2 * sizes.H)
    if pid_p < n_split:
        row_ptr = part_ptr + pid_p * (2 * sizes.H)
    for g in tl.static_range(sizes.N_H):
        offs_h, mask_h = heads_of(g, sizes)
        tl.store(row_ptr + offs_h, tl.sum(sum_at[g], 0), mask=mask_h)
        tl.store(row_ptr + sizes.H + offs_h, tl.sum(sum_a[g], 0), mask=mask_h)


@triton.jit
def _edge_softmax_bwd_kernel(
    ds_ptr, dtop_ptr, da_ptr, s_ptr, norm_ptr, sums_ptr, weighting, view, sizes: tl.constexpr
):
    pid_p = tl.program_id(0).to(tl.int64)
    row, beg, count = load_piece(view, pid_p)
    offs_e = edge_offsets(sizes)
    top = load_top(weighting)
    shift, inverse = load_norm(norm_ptr, row, weighting, sizes)
    sum_at = load_per_head(sums_ptr + row * (2 * sizes.H), 0.0, sizes)
    sum_a = load_per_head(sums_ptr + row * (2 * sizes.H) + sizes.H, 1.0, sizes)
    delta = ()
    for g in tl.static_range(sizes.N_H):
        # Σ a is 1 but for roundings, and Σ ds, 0 by rights, would be wrong by as much.
        delta = delta + (sum_at[g] / sum_a[g],)
    top_sums = ()
    if weighting.top is not None:
        top_sums = zeros(sizes.N_H, sizes.BLOCK_H, sizes)
    for e in range(0, count, sizes.BLOCK_E * sizes.BLOCK_G):
        s = load_table(s_ptr, beg, e + offs_e, count, sizes)
        t = load_table(da_ptr, beg, e + offs_e, count, sizes)
        a = weights(s, shift, inverse, weighting, top)
        ds = ()
        for g in tl.static_range(sizes.N_H):
            ds_g = past_normalizer(a[g] * (t[g] - delta[g]), s[g], weighting, top)
            ds = ds + (tl.where((e + offs_e < count)[:, :, None], ds_g, 0.0),)
        store_per_head(table_rows(ds_ptr, beg, e + offs_e, sizes), ds, e + offs_e < count, sizes)
        if weighting.top is not None:
            sums = top_sums
            top_sums = ()
            for g in tl.static_range(sizes.N_H):
                top_sums = top_sums + (sums[g] + tl.sum(ds[g], 0),)
    if weighting.top is not None:
        tl.store(dtop_ptr + pid_p, all_scores(top_sums))


@launcher
def edge_softmax_fwd(
    s: Float[Tensor, "E H"],
    *,
    weighting: Weighting,
    top: Float[Tensor, ""] | None = None,
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "E H"], Float[Tensor, "N 2 H"]]:
    """Weights `a` of the scores `s`, in slot order, and `norm`."""
    view, h = weighting.groups(csr, csr_t), s.shape[1]
    work, n = view.work, view.rowptr.numel() - 1
    norm = torch.empty((n, 2, h), dtype=torch.float32, device=s.device)
    a, s = torch.empty(s.shape, dtype=s.dtype, device=s.device), in_view(s, view)
    if n:
        of = kernel_weighting(weighting, 1, edge_weight=None, top=top)
        given: dict[str, Any] = {"weighting": of, "view": view_of(view, needs_slot=False)}
        given |= _sizes(h)
        part = torch.empty((work.n_split, 2, h), dtype=torch.float32, device=s.device)
        programs = (work.piece_row.numel(),)
        _edge_softmax_fwd_norm_kernel[programs](norm, part, s, n_split=work.n_split, **given)
        join_norm(norm, part, weighting=of, csr=view)
        _edge_softmax_fwd_kernel[programs](a, s, norm, **given)
    return in_slots(a, view), norm


@launcher
def edge_softmax_bwd(
    da: Float[Tensor, "E H"],
    s: Float[Tensor, "E H"],
    *,
    weighting: Weighting,
    top: Float[Tensor, ""] | None = None,
    norm: Float[Tensor, "N 2 H"],
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "E H"], Float[Tensor, ""] | None]:
    """Gradients by the scores, and by the largest of them as if it were an input."""
    view, (n, _, h) = weighting.groups(csr, csr_t), norm.shape
    work, programs = view.work, (view.work.piece_row.numel(),)
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    dtop = None if top is None else torch.empty(programs, dtype=torch.float32, device=s.device)
    if n:
        of = kernel_weighting(weighting, 1, edge_weight=None, top=top)
        given: dict[str, Any] = {"da_ptr": in_view(da, view), "s_ptr": in_view(s, view)}
        given |= {"norm_ptr": norm, "weighting": of, "view": view_of(view, needs_slot=False)}
        given |= _sizes(h)
        sums, part = (
            torch.empty((rows, 2 * h), dtype=torch.float32, device=s.device)
            for rows in (n, work.n_split)
        )
        _edge_softmax_bwd_sums_kernel[programs](sums, part, n_split=work.n_split, **given)
        join_rows(sums, part, view)
        _edge_softmax_bwd_kernel[programs](ds, dtop, sums_ptr=sums, **given)
    return in_slots(ds, view), None if dtop is None else -dtop.sum()


@lru_cache(maxsize=256)
def _sizes(h: int) -> dict[str, Any]:
    """Compile-time sizes and warps: the heads of an edge in lanes side by side."""
    heads = int(triton.next_power_of_2(h))
    sizes = Sizes(H=h, BLOCK_H=heads, N_H=1, BLOCK_E=_TURN, BLOCK_G=max(1, 32 // heads))
    return {"sizes": sizes, "num_warps": 1}
