"""The end of a backward pass of the attention: dq and Delta of a row, and rows of several pieces.

With p the weights before they are divided by their sum, t their gradients, and c = ρ w φ'(u) of
each edge, dq = scale (Σ c p t k − Delta Σ c p k) / Σ p, Delta = Σ p t / Σ p: a piece leaves four
sums, which are plain and join by adding in order. Seen from the senders, q and k change places.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.weighting import past_function, past_normalizer
from grand_fast.kernels.gpu.sizes import row_warps
from grand_fast.kernels.gpu.sums import add_weighted, join, join_lanes, zeros
from grand_fast.kernels.gpu.tiles import head_columns, heads_of


@triton.jit
def no_dq_sums(BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_A: tl.constexpr,
               N_A: tl.constexpr, N_H: tl.constexpr):  # fmt: skip
    """Σ p, Σ p t (N_H groups of heads each), Σ c p k, Σ c p t k (N_A chunks), before any edge."""
    return (
        zeros(N_H, BLOCK_G, BLOCK_H),
        zeros(N_H, BLOCK_G, BLOCK_H),
        zeros(N_A, BLOCK_G, BLOCK_A),
        zeros(N_A, BLOCK_G, BLOCK_A),
    )


@triton.jit
def add_dq_sums(sums, p, t, k, u, s, w, weighting, top, BLOCK_H: tl.constexpr,
                N_H: tl.constexpr):  # fmt: skip
    """The sums with one more turn: N_H of [BLOCK_E, BLOCK_G, BLOCK_H or 1], and k in chunks."""
    sum_p = ()
    sum_pt = ()
    cp = ()
    cpt = ()
    for h in tl.static_range(N_H):
        sum_p = sum_p + (sums[0][h] + tl.sum(p[h], 0),)
        # not by `add_products`: with heads as columns, Triton 3.7 fails to compile it for AMD
        sum_pt = sum_pt + (sums[1][h] + tl.sum(p[h] * t[h], 0),)
        cp_h = past_normalizer(p[h], s[h], weighting, top)
        cp_h = past_function(cp_h, u[h], w, weighting)
        cp = cp + (cp_h,)
        cpt = cpt + (cp_h * t[h],)
    return (
        sum_p,
        sum_pt,
        add_weighted(sums[2], cp, k, BLOCK_H),
        add_weighted(sums[3], cpt, k, BLOCK_H),
    )


@triton.jit
def join_dq_sums(sums):
    """The sums over all groups of lanes: [BLOCK_H], [BLOCK_H], [BLOCK_A], [BLOCK_A] each."""
    return join_lanes(sums[0]), join_lanes(sums[1]), join_lanes(sums[2]), join_lanes(sums[3])


@triton.jit
def store_dq(
    dq_ptr,
    norm_delta_ptr,
    sum_p,
    sum_pt,
    sum_pk,
    sum_ptk,
    t0,
    shift,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
):
    """dq of one row, and what the column pass needs of it: shift in base 2, 1 / Σ p and Delta.

    sum_p, sum_pt, shift: N_H of [BLOCK_H]; sum_pk, sum_ptk: N_A of [BLOCK_A]. t is counted from t0,
    which cancels in dq. The difference of the two sums can be small against them. So the sum that
    divides them is that of the very p in them, and no other that differs by a rounding of scores.
    """
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        over_p = tl.where(sum_p[g] == 0.0, 0.0, 1.0 / sum_p[g])  # a row without edges: dq = 0
        delta = sum_pt[g] * over_p
        at = norm_delta_ptr + offs_h
        tl.store(at, shift[g], mask=offs_h < H)
        tl.store(at + H, over_p, mask=offs_h < H)
        tl.store(at + 2 * H, delta + t0, mask=offs_h < H)
        for c in tl.static_range(g * (N_A // N_H), (g + 1) * (N_A // N_H)):
            pk = tl.reshape(sum_pk[c], [BLOCK_H, BLOCK_A // BLOCK_H])
            ptk = tl.reshape(sum_ptk[c], [BLOCK_H, BLOCK_A // BLOCK_H])
            dq = (scale * over_p)[:, None] * (ptk - delta[:, None] * pk)
            offs, mask = head_columns(c, H, d_k, BLOCK_A, VEC_A, BLOCK_K)
            dq = tl.reshape(dq, offs.shape).to(dq_ptr.dtype.element_ty)
            tl.store(dq_ptr + offs, dq, mask=mask)


@triton.jit
def store_dq_part(
    part_ptr,
    sum_p,
    sum_pt,
    sum_pk,
    sum_ptk,
    t0,
    shift,
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
    N_A: tl.constexpr,
    N_H: tl.constexpr,
):
    """The sums of one piece, a row of `part`: Σ c p k | Σ c p t k | Σ p | Σ p t | t0 | shift."""
    columns: tl.constexpr = N_A * BLOCK_A
    heads: tl.constexpr = N_H * BLOCK_H
    for c in tl.static_range(N_A):
        at = part_ptr + c * BLOCK_A + tl.arange(0, BLOCK_A)
        tl.store(at, sum_pk[c])
        tl.store(at + columns, sum_ptk[c])
    for g in tl.static_range(N_H):
        at = part_ptr + 2 * columns + heads_of(g, BLOCK_H)
        tl.store(at, sum_p[g])
        tl.store(at + heads, sum_pt[g])
        tl.store(at + 2 * heads, tl.zeros([BLOCK_H], tl.float32) + t0)
        tl.store(at + 3 * heads, shift[g])


@triton.jit
def add_scores(sums, ds):
    """Σ ds, N_H of [BLOCK_G, BLOCK_H], with one more turn."""
    new = ()
    for h in tl.static_range(len(ds)):
        new = new + (sums[h] + tl.sum(ds[h], 0),)
    return new


@triton.jit
def all_scores(sums):
    """The sum over all heads and groups of lanes."""
    total = tl.sum(tl.sum(sums[0], 0), 0)
    for h in tl.static_range(1, len(sums)):
        total += tl.sum(tl.sum(sums[h], 0), 0)
    return total


@triton.jit
def store_heads(row_ptr, dk, H: tl.constexpr, d_k: tl.constexpr, BLOCK_A: tl.constexpr,
                VEC_A: tl.constexpr, BLOCK_K: tl.constexpr, N_A: tl.constexpr):  # fmt: skip
    """Write a row of dk, given in N_A chunks [BLOCK_A]."""
    for c in tl.static_range(N_A):
        offs, mask = head_columns(c, H, d_k, BLOCK_A, VEC_A, BLOCK_K)
        dk_c = tl.reshape(dk[c], offs.shape).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + offs, dk_c, mask=mask)


@triton.jit
def _edge_attention_bwd_dq_join_kernel(
    dq_ptr,
    norm_delta_ptr,
    part_ptr,
    split_row_ptr,
    split_ptr_ptr,
    scale,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    width: tl.constexpr = 2 * BLOCK_A + 4 * BLOCK_H
    offs_a = tl.arange(0, BLOCK_A)[:, None]
    offs_h = 2 * BLOCK_A + tl.arange(0, BLOCK_H)[:, None]
    sum_pk = tl.reshape(join(part_ptr, first, last, offs_a, offs_a < width, width), [BLOCK_A])
    part_t = part_ptr + BLOCK_A
    sum_ptk = tl.reshape(join(part_t, first, last, offs_a, offs_a < width, width), [BLOCK_A])
    sum_p = tl.reshape(join(part_ptr, first, last, offs_h, offs_h < width, width), [BLOCK_H])
    part_t = part_ptr + BLOCK_H
    sum_pt = tl.reshape(join(part_t, first, last, offs_h, offs_h < width, width), [BLOCK_H])
    offs_h = tl.arange(0, BLOCK_H)
    # alike in all pieces of a row
    t0 = tl.load(part_ptr + first * width + 2 * BLOCK_A + 2 * BLOCK_H + offs_h)
    shift = tl.load(part_ptr + first * width + 2 * BLOCK_A + 3 * BLOCK_H + offs_h)
    store_dq(
        dq_ptr + row * (H * d_k), norm_delta_ptr + row * (3 * H), (sum_p,), (sum_pt,), (sum_pk,),
        (sum_ptk,), t0, (shift,), scale, H, d_k, BLOCK_H, BLOCK_K, BLOCK_A, 1, 1, 1,
    )  # fmt: skip


@triton.jit
def _edge_attention_bwd_dk_join_kernel(
    dk_ptr,
    part_ptr,
    split_row_ptr,
    split_ptr_ptr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    offs_a = tl.arange(0, BLOCK_A)[:, None]
    dk = join(part_ptr, first, last, offs_a, offs_a < H * d_k, H * d_k)
    at = dk_ptr + row * (H * d_k) + offs_a
    tl.store(at, dk.to(dk_ptr.dtype.element_ty), mask=offs_a < H * d_k)


def join_dq(
    dq: Float[Tensor, "N H d_k"],
    norm_delta: Float[Tensor, "N 3 H"],
    part: Float[Tensor, "P W"],
    *,
    scale: float,
    csr: Csr,
    sizes: dict[str, int],
) -> None:
    """Write the rows of `dq` and `norm_delta` that have several pieces, from their sums `part`."""
    work, (_, h, d_k) = csr.work, dq.shape
    if work.n_split == 0:
        return
    columns, heads = _padded(sizes)
    _edge_attention_bwd_dq_join_kernel[(work.split_row.numel(),)](
        dq,
        norm_delta,
        part,
        split_row_ptr=work.split_row,
        split_ptr_ptr=work.split_ptr,
        scale=scale,
        H=h,
        d_k=d_k,
        BLOCK_H=heads,
        BLOCK_K=sizes["BLOCK_K"],
        BLOCK_A=columns,
        num_warps=row_warps(columns),
    )


def join_dk(dk: Float[Tensor, "N H d_k"], part: Float[Tensor, "P d_att"], *, csr: Csr) -> None:
    """Write the rows of `dk` that have several pieces, from their sums `part`."""
    work, (_, h, d_k) = csr.work, dk.shape
    if work.n_split == 0:
        return
    columns = int(triton.next_power_of_2(h * d_k))
    _edge_attention_bwd_dk_join_kernel[(work.split_row.numel(),)](
        dk,
        part,
        work.split_row,
        split_ptr_ptr=work.split_ptr,
        H=h,
        d_k=d_k,
        BLOCK_A=columns,
        num_warps=row_warps(columns),
    )


def dq_part(csr: Csr, sizes: dict[str, int]) -> Float[Tensor, "P W"]:
    """Memory for the sums of the pieces of split rows, as `store_dq_part` lays them out."""
    columns, heads = _padded(sizes)
    width = 2 * columns + 4 * heads
    return torch.empty((csr.work.n_split, width), dtype=torch.float32, device=csr.col.device)


def _padded(sizes: dict[str, int]) -> tuple[int, int]:
    """Columns and heads of a row of q, padded."""
    return sizes["N_A"] * sizes["BLOCK_A"], sizes["N_H"] * sizes["BLOCK_H"]
