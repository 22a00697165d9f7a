"""What both passes of the backward of `edge_attention` share: the gradients of weights.

The passes are named as where receivers normalise. Where senders do, the row pass goes over Aᵀ and
gives dk and Delta, the column pass over A and gives dq: q and k change places.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import triton
import triton.language as tl
from torch import Tensor

from grand_fast.kernels.gpu.tiles import heads_of

VALUES = 16  # of a gathered tile, per lane: next to it two accumulators, or `norm` and Delta


@triton.jit
def load_da(da_ptr, slot, mask_e, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr,
            IS_MEAN: tl.constexpr):  # fmt: skip
    """Gradients of the weights of [BLOCK_E, BLOCK_G] slots, N_H groups with a column per head.

    One column serves all heads of a group if `da` is that of the mean.
    """
    t = ()
    for g in tl.static_range(N_H):
        if IS_MEAN:
            at = da_ptr + slot[:, :, None].to(tl.int64)
            da = tl.load(at, mask=mask_e[:, :, None], other=0.0)
        else:
            at = da_ptr + slot[:, :, None].to(tl.int64) * H + heads_of(g, BLOCK_H)
            mask = mask_e[:, :, None] & (heads_of(g, BLOCK_H) < H)
            da = tl.load(at, mask=mask, other=0.0)
        t = t + (da.to(tl.float32),)
    return t


def heads_of_mean(da: Tensor, h: int) -> int:
    """What a score's gradient is divided by; `da` of the mean counts each head 1/H."""
    return h if da.dim() == 1 else 1
