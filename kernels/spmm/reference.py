"""spmm: y[i,h,:] = Σ_{e in row i} a[e,h] · x[col[e],h,:]

With K = 1 all heads share the vectors of x, and x[col[e],0,:] stands there.
Plain PyTorch, differentiable by autograd, correct in any float type (sums in float32 or wider).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Cost, Csr, edge_rows


def spmm_fwd(
    x: Float[Tensor, "N K d"], a: Float[Tensor, "E H"], *, csr: Csr
) -> Float[Tensor, "N H d"]:
    """The product of the matrices `A_h`, whose values are `a` in the slot order of `csr`, with x.

    K is 1 or H.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    messages = a.to(wide)[:, :, None] * x.to(wide)[csr.col.long()]  # [E, H, d]
    y = messages.new_zeros(x.shape[0], a.shape[1], x.shape[2])
    return y.index_add(0, edge_rows(csr), messages).to(x.dtype)


def cost(
    *, n: int, e: int, h: int, d: int, element_bytes: int, shared: bool, index_bytes: int = 4
) -> Cost:
    """Bytes and flops of one forward call; `shared`: all heads have the same vectors."""
    index, width = index_bytes * (n + 1 + e), d if shared else h * d
    once = index + element_bytes * (e * h + n * h * d)
    return Cost(
        bytes_min=once + element_bytes * n * width,
        bytes_max=once + element_bytes * e * width,
        flops=2 * e * h * d,
    )
