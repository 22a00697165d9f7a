"""edge_attention: a[e,h] = exp(s[e,h] − lse[i,h]), s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k

for e in row i, with lse[i,h] = log Σ_{e in row i} exp(s[e,h]): a softmax over the senders of i.
Plain PyTorch, differentiable by autograd, correct in any float type (sums in float32 or wider).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Cost, Csr, edge_rows


def edge_attention_fwd(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    mean_heads: bool,
    csr: Csr,
) -> tuple[Float[Tensor, "E H"] | Float[Tensor, " E"], Float[Tensor, "N H"]]:
    """Edge weights `a` in slot order (their mean over heads if `mean_heads`), and `lse`."""
    n, h, d_k = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    row = edge_rows(csr)
    s = (q.to(wide)[row] * k.to(wide)[csr.col.long()]).sum(2) / math.sqrt(d_k)  # [E, H]
    # The maximum only keeps exp in range: it cancels, so it carries no gradient.
    top = torch.full((n, h), -math.inf, dtype=wide, device=q.device)
    top = top.scatter_reduce(0, row[:, None].expand_as(s), s.detach(), "amax")
    shifted = torch.zeros((n, h), dtype=wide, device=q.device)
    shifted = shifted.index_add(0, row, torch.exp(s - top[row]))
    lse = top + torch.log(shifted)  # −inf in a row without edges
    a = torch.exp(s - lse[row])
    return (a.mean(1) if mean_heads else a).to(q.dtype), lse


def cost(*, n: int, e: int, h: int, d_k: int, element_bytes: int, index_bytes: int = 4) -> Cost:
    """Bytes and flops of one forward call that writes the weights of all heads."""
    index = index_bytes * (n + 1 + e)
    written = element_bytes * e * h + 4 * n * h
    return Cost(
        bytes_min=index + written + element_bytes * 2 * n * h * d_k,
        bytes_max=index + written + element_bytes * (n + e) * h * d_k,
        flops=e * h * (2 * d_k + 3),
    )
