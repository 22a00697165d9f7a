"""What both passes of the backward of `attention_diffusion` share: their lanes, and dx.

The passes are named as where receivers normalise. Where senders do, the row pass goes over Aᵀ and
gives dk, Delta and dx, the column pass over A and gives dq: q and k, and df and x, change places.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import triton
import triton.language as tl

from grand_fast.kernels.gpu.diffusion import store_diffusion, store_values
from grand_fast.kernels.gpu.sizes import head_lanes, head_sizes, value_lanes, value_sizes
from grand_fast.kernels.gpu.sums import add_weighted

# A lane reads 128 bits of float32 at once. With 128 bits of a half type, half the lanes would read
# a row, each with twice the registers: fewer warps, slower where two tables are gathered.
LANE_COLUMNS = 4


@triton.jit
def add_values(sums, a, x):
    """Σ w x with one more turn: w = Σ a over heads, a of `weight`; x in chunks."""
    w = tl.sum(a[0], 2)
    for h in tl.static_range(1, len(a)):
        w += tl.sum(a[h], 2)
    return add_weighted(sums, (w[:, :, None],), x, 1)


@triton.jit
def store_dx(
    dx_ptr,
    part_x_ptr,
    ax,
    df_ptr,
    alpha_ptr,
    add,
    row,
    pid_p,
    n_split,
    stride_dx_n: tl.constexpr,
    stride_df_n: tl.constexpr,
    d: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
):
    """dx of a row from its Σ w df, or that sum of one of its pieces."""
    if pid_p < n_split:
        store_values(part_x_ptr + pid_p * d, ax, d, BLOCK_D, VEC_D, N_D)
    else:
        store_diffusion(
            dx_ptr, ax, df_ptr, alpha_ptr, alpha_ptr, df_ptr, add, row, stride_dx_n, stride_df_n,
            stride_df_n, d, False, IS_SCALED, BLOCK_D, VEC_D, N_D,
        )  # fmt: skip


def sizes_of(d: int, h: int, d_k: int) -> tuple[int, dict[str, int]]:
    """Lanes that read a row, and compile-time sizes."""
    # Few lanes a row leave its sums few shuffles, but they are to read the scores' table at once.
    lanes = max(value_lanes(d, LANE_COLUMNS) // 2, head_lanes(h, d_k, LANE_COLUMNS))
    sizes = head_sizes(h, d_k, lanes, LANE_COLUMNS) | value_sizes(d, lanes, LANE_COLUMNS)
    return lanes, sizes
