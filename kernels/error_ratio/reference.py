"""error_ratio: r = √(mean_i (e_i / (atol + rtol · max(|x_i|, |y_i|)))²),  e = Σ_s c_s · f_s

The error of an adaptive step over its tolerance, in the root mean square over the whole state.
Plain PyTorch, correct in any float type (sums in float32 or wider).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grand_fast.kernels.csr import Cost


def error_ratio_fwd(
    tensors: Sequence[Tensor],
    scales: Sequence[float],
    x: Tensor,
    y: Tensor,
    *,
    rtol: float,
    atol: float,
) -> Tensor:
    """The ratio, a scalar in float32 or wider; tensors alike in shape."""
    wide = torch.promote_types(x.dtype, torch.float32)
    error = scales[0] * tensors[0].to(wide)
    for scale, tensor in zip(scales[1:], tensors[1:], strict=True):
        error = error + scale * tensor.to(wide)
    tolerance = atol + rtol * torch.maximum(x.abs(), y.abs()).to(wide)
    return (error / tolerance).square().mean().sqrt()


def cost(*, elements: int, terms: int, element_bytes: int) -> Cost:
    """Bytes and flops of one call: every tensor is read once."""
    moved = element_bytes * elements * (terms + 2)
    return Cost(bytes_min=moved, bytes_max=moved, flops=elements * (2 * terms + 7))
