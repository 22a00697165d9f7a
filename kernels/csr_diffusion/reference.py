"""csr_diffusion: f[i,:] = alpha · (Σ_{e in row i} a[e] · x[col[e],:] − x[i,:])
                          + beta · x0[i,:] + Σ_s c_s · y_s[i,:]

Plain PyTorch, differentiable by autograd, correct in any float type (sums in float32 or wider).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Cost, Csr, edge_rows


def csr_diffusion_fwd(
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    *,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add = (),
    csr: Csr,
) -> Float[Tensor, "N d"]:
    """The vector field of a diffusion with given weights `a`, in the slot order of `csr`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xw = x.to(wide)
    messages = a.to(wide)[:, None] * xw[csr.col.long()]  # [E, d]
    ax = torch.zeros_like(xw).index_add(0, edge_rows(csr), messages)
    f = alpha * (ax - xw)
    if beta is not None and x0 is not None:
        f = f + beta * x0.to(wide)
    for scale, y in add:
        f = f + scale * y.to(wide)
    return f.to(x.dtype)


def cost(*, n: int, e: int, d: int, element_bytes: int, index_bytes: int = 4) -> Cost:
    """Bytes and flops of one forward call with `n` nodes, `e` edges and `d` channels, no source."""
    index = index_bytes * (n + 1 + e)
    return Cost(
        bytes_min=index + element_bytes * (e + 2 * n * d),
        bytes_max=index + element_bytes * (e + e * d + 2 * n * d),
        flops=2 * e * d + 2 * n * d,
    )
