"""edge_softmax: a[e,h] = p(s[e,h]) / Σ p(s[e',h]) over the edges e' of e's receiver or sender

p and the group are those of a `Weighting`. Plain PyTorch, differentiable by autograd, correct in
any float type (sums in float32 or wider).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Cost, Csr, edge_rows
from grand_fast.kernels.edge_attention.reference import normalised
from grand_fast.kernels.weighting import Weighting


def edge_softmax_fwd(
    s: Float[Tensor, "E H"],
    *,
    weighting: Weighting,
    top: Float[Tensor, ""] | None = None,
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "E H"], Float[Tensor, "N 2 H"]]:
    """Weights `a` of the scores `s`, in slot order, and `norm`.

    `top`, the largest score, comes with the normaliser squareplus; `csr_t` is not needed here.
    """
    wide = torch.promote_types(s.dtype, torch.float32)
    group = edge_rows(csr) if weighting.normalize == "receiver" else csr.col.long()
    n = csr.rowptr.numel() - 1
    a, norm = normalised(s.to(wide), group, n, weighting=weighting, top=top)
    return a.to(s.dtype), norm


def cost(*, n: int, e: int, h: int, element_bytes: int, index_bytes: int = 4) -> Cost:
    """Bytes and flops of one forward call over the edges of receivers.

    bytes_max: with the scores of a row read anew by each of three sweeps.
    """
    once = index_bytes * (n + 1) + element_bytes * 2 * e * h + 8 * n * h
    return Cost(bytes_min=once, bytes_max=once + element_bytes * 2 * e * h, flops=4 * e * h)
