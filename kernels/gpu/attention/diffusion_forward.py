"""The forward kernel of `attention_diffusion`, its sizes, and the field that it gives."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (functions under @triton.jit take values that Python's types cannot name)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.gpu.attention.diffusion_backward import LANE_COLUMNS
from grand_fast.kernels.gpu.attention.diffusion_weighted_sum import sweep_once, weighted_sum
from grand_fast.kernels.gpu.attention.scores import load_norm, norm_of, store_norm, sweep_scores
from grand_fast.kernels.gpu.attention.weighting import KernelWeighting, load_top
from grand_fast.kernels.gpu.diffusion import (
    dense,
    join_diffusion,
    store_diffusion,
    store_values,
)
from grand_fast.kernels.gpu.sizes import (
    edges,
    head_lanes,
    head_sizes,
    load_columns,
    value_lanes,
    value_sizes,
    vector,
)
from grand_fast.kernels.gpu.tiles import load_heads, load_piece

_VALUES = 32  # of the gathered tiles, per lane
# One sweep has an accumulator per head, of so many elements a lane together; with more heads a
# second gather of k costs less than the registers.
_ACCUMULATORS = 40
# For A100 and H100 NVIDIA's compiler starts the exchanges of many heads early, each in registers of
# its own: 118 of them, or 96 if told so, which lets 20 warps be resident instead of 16.
# For Blackwell it would stay at 96 by itself, and spill.
_MANY_HEADS, _REGISTERS, REGISTERS_OF_BLACKWELL = 8, 96, 120


@triton.jit(do_not_specialize=["n_split"])
def _attention_diffusion_fwd_kernel(
    f_ptr,
    norm_ptr,
    part_ptr,
    x_ptr,
    q_ptr,
    k_ptr,
    alpha_ptr,
    beta_ptr,
    x0_ptr,
    add,
    weighting,
    col_ptr,
    slot_ptr,
    piece_row_ptr,
    piece_beg_ptr,
    piece_end_ptr,
    n_split,
    stride_f_n: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_q_n: tl.constexpr,
    stride_k_n: tl.constexpr,
    stride_x0_n: tl.constexpr,
    d: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    IS_BY_SENDER: tl.constexpr,
    IS_ONE_SWEEP: tl.constexpr,
    IS_ABSORBED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
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
    top = load_top(weighting)
    if IS_BY_SENDER:
        ax = weighted_sum(
            q, (), (), norm_ptr, k_ptr, x_ptr, weighting, top, col_ptr, slot_ptr, beg, count,
            stride_k_n, stride_x_n, d, H, d_k, BLOCK_D, VEC_D, N_D, BLOCK_H, BLOCK_K, BLOCK_A,
            VEC_A, N_A, N_H, BLOCK_E, BLOCK_G, IS_ABSORBED,
        )  # fmt: skip
    else:
        if pid_p < n_split:
            shift, inverse = load_norm(norm_ptr + row * (2 * H), weighting, H, BLOCK_H, N_H)
            if IS_ONE_SWEEP:
                ax = weighted_sum(
                    q, shift, inverse, norm_ptr, k_ptr, x_ptr, weighting, top, col_ptr, slot_ptr,
                    beg, count, stride_k_n, stride_x_n, d, H, d_k, BLOCK_D, VEC_D, N_D, BLOCK_H,
                    BLOCK_K, BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G, IS_ABSORBED,
                )  # fmt: skip
        else:
            if IS_ONE_SWEEP:
                ax, m, l = sweep_once(  # noqa: E741
                    q, k_ptr, x_ptr, weighting, top, col_ptr, slot_ptr, beg, count, stride_k_n,
                    stride_x_n, d, H, d_k, BLOCK_D, VEC_D, N_D, BLOCK_H, BLOCK_K, BLOCK_A, VEC_A,
                    N_A, N_H, BLOCK_E, BLOCK_G, IS_ABSORBED,
                )  # fmt: skip
            else:
                m, l = sweep_scores(  # noqa: E741
                    q, k_ptr, weighting, top, col_ptr, slot_ptr, beg, count, stride_k_n, H, d_k,
                    BLOCK_H, BLOCK_K, BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G,
                )  # fmt: skip
            shift, inverse = norm_of(m, l, H, BLOCK_H, N_H)
        if not IS_ONE_SWEEP:
            ax = weighted_sum(
                q, shift, inverse, norm_ptr, k_ptr, x_ptr, weighting, top, col_ptr, slot_ptr, beg,
                count, stride_k_n, stride_x_n, d, H, d_k, BLOCK_D, VEC_D, N_D, BLOCK_H, BLOCK_K,
                BLOCK_A, VEC_A, N_A, N_H, BLOCK_E, BLOCK_G, IS_ABSORBED,
            )  # fmt: skip
    if pid_p < n_split:
        store_values(part_ptr + pid_p * d, ax, d, BLOCK_D, VEC_D, N_D)
    else:
        store_diffusion(
            f_ptr, ax, x_ptr, alpha_ptr, beta_ptr, x0_ptr, add, row, stride_f_n, stride_x_n,
            stride_x0_n, d, HAS_SOURCE, True, BLOCK_D, VEC_D, N_D,
        )  # fmt: skip
        if not IS_BY_SENDER:
            store_norm(norm_ptr + row * (2 * H), shift, inverse, weighting, H, BLOCK_H, N_H)


def _lanes(d: int, h: int, d_k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Lanes that read a row, and columns of x that one of them reads at most at once."""
    # Those of x: accumulators take fewer registers than with the lanes of a wider q.
    most = load_columns(dtype) if h == 1 else LANE_COLUMNS  # one accumulator may be wide
    lanes = max(value_lanes(d, most), head_lanes(h, d_k, most) // 4)
    if h >= _MANY_HEADS and dtype.itemsize == 2 and 2 * lanes * vector(d, most) >= 3 * d:
        # A third of all columns would be padding, in every head's sums: narrow loads cost less.
        lanes, most = max(lanes // 2, head_lanes(h, d_k, most) // 4), 1
    return lanes, most


def key_sizes(d: int, h: int, d_k: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time sizes of q and k; `write_norm` is to have the same."""
    return head_sizes(h, d_k, _lanes(d, h, d_k, dtype)[0], load_columns(dtype))


def _sizes(
    d: int,
    h: int,
    d_k: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    one_table: bool,
    by_sender: bool,
) -> dict[str, int | bool]:
    """Compile-time sizes and warps; whether k and x are gathered in one sweep, and as one."""
    lanes, most = _lanes(d, h, d_k, dtype)
    sizes = key_sizes(d, h, d_k, dtype) | value_sizes(d, lanes, most)
    heads = sizes["BLOCK_H"] * sizes["N_H"]
    is_one_sweep = not by_sender and heads * sizes["VEC_D"] * sizes["N_D"] <= _ACCUMULATORS
    chunks = [sizes[f"{size}_{table}"] for table in "AD" for size in ("BLOCK", "N")]
    scalars = sizes["BLOCK_H"] if by_sender else 1
    options = {**sizes, **edges(sizes, lanes, _VALUES, scalars=scalars)}
    options |= {"IS_BY_SENDER": by_sender, "IS_ONE_SWEEP": is_one_sweep}
    options["IS_ABSORBED"] = one_table and chunks[:2] == chunks[2:]
    if is_one_sweep and heads >= _MANY_HEADS and torch.version.hip is None:
        options["maxnreg"] = _registers(device)
    return options


def _registers(device: torch.device) -> int:
    """How many the compiler is told to use at most."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0):
        return REGISTERS_OF_BLACKWELL
    return _REGISTERS


def _is_same(k: Tensor, x: Tensor) -> bool:
    """Whether k is x itself, as one head. `data_ptr` says it not: that of a meta tensor is 0."""
    storages = [t.untyped_storage()._cdata for t in (k, x)]
    rows = [(t.storage_offset(), t.stride(0), t[:1].numel()) for t in (k, x)]
    return storages[0] == storages[1] and rows[0] == rows[1] and k.shape[1] == 1


def write_field(
    f: Float[Tensor, "N d"],
    norm: Float[Tensor, "N 2 H"],
    x: Float[Tensor, "N d"],
    *,
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    weighting: KernelWeighting,
    by_sender: bool,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add,
    csr: Csr,
) -> None:
    """Write the field `f`, and the rows of `norm` that are not yet known."""
    work, d, (n, h, d_k) = csr.work, x.shape[1], q.shape
    if n == 0:
        return
    part = torch.empty((work.n_split, d), dtype=torch.float32, device=x.device)
    _attention_diffusion_fwd_kernel[(work.piece_row.numel(),)](
        f,
        norm,
        part,
        x_ptr=x,
        q_ptr=q,
        k_ptr=k,
        alpha_ptr=alpha,
        beta_ptr=beta,
        x0_ptr=x0,
        add=dense(add),
        weighting=weighting,
        col_ptr=csr.col,
        slot_ptr=weighting.slot(csr),
        piece_row_ptr=work.piece_row,
        piece_beg_ptr=work.piece_beg,
        piece_end_ptr=work.piece_end,
        n_split=work.n_split,
        stride_f_n=f.stride(0),
        stride_x_n=x.stride(0),
        stride_q_n=q.stride(0),
        stride_k_n=k.stride(0),
        stride_x0_n=0 if x0 is None else x0.stride(0),
        d=d,
        H=h,
        d_k=d_k,
        HAS_SOURCE=x0 is not None,
        **_sizes(d, h, d_k, x.dtype, x.device, one_table=_is_same(k, x), by_sender=by_sender),
    )
    join_diffusion(f, part, x, alpha=alpha, beta=beta, x0=x0, add=add, csr=csr, is_scaled=True)
