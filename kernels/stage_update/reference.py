"""stage_update: y = Σ_s c_s · y_s, as every stage of a Runge–Kutta or Adams step has it

Plain PyTorch, differentiable by autograd, correct in any float type (sums in float32 or wider).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grand_fast.kernels.csr import Cost


def stage_update_fwd(tensors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """`Σ_s scales[s] · tensors[s]`, from left to right."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    y = scales[0] * tensors[0].to(wide)
    for tensor, scale in zip(tensors[1:], scales[1:], strict=True):
        y = y + scale * tensor.to(wide)
    return y.to(tensors[0].dtype)


def cost(*, elements: int, terms: int, element_bytes: int) -> Cost:
    """Bytes and flops of one forward call: every tensor is read once, and the result written."""
    moved = element_bytes * elements * (terms + 1)
    return Cost(bytes_min=moved, bytes_max=moved, flops=2 * elements * terms)
