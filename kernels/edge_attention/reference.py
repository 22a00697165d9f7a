"""edge_attention: a[e,h] = p(s[e,h]) / Σ p(s[e',h]) over the edges e' of e's receiver or sender

with s[e,h] = φ(scale · <q[i,h,:], k[j,h,:]>) · w[e] for e: j → i; φ, p and the group are those of a
`Weighting`. By default s = <q, k> / √d_k and a softmax over the senders of i.
Plain PyTorch, differentiable by autograd, correct in any float type (sums in float32 or wider).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Cost, Csr, edge_rows
from grand_fast.kernels.weighting import Weighting, scaled_dot


def edge_scores(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting,
    edge_key: Float[Tensor, "E H d_k"] | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    receiver: Tensor,
    sender: Tensor,
) -> Float[Tensor, "E H"]:
    """Scores of the edges `sender → receiver`, before they are normalised, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide)[sender]  # [E, H, d_k]
    if edge_key is not None:
        keys = keys + edge_key.to(wide)
    u = weighting.scale * (q.to(wide)[receiver] * keys).sum(2)
    if weighting.function == "exp":
        u = torch.exp(u)
    elif weighting.function == "leaky_relu":
        u = torch.nn.functional.leaky_relu(u, weighting.slope)
    return u if edge_weight is None else u * edge_weight.to(wide)[:, None]


def edge_attention_top(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting,
    edge_weight: Float[Tensor, " E"] | None,
    csr: Csr,
) -> Float[Tensor, "N H"]:
    """The largest score of each receiver and head; −inf where there is no edge."""
    n, h, _ = q.shape
    row = edge_rows(csr)
    s = edge_scores(
        q, k, weighting=weighting, edge_weight=edge_weight, receiver=row, sender=csr.col.long()
    )
    top = torch.full((n, h), -math.inf, dtype=s.dtype, device=q.device)
    return top.scatter_reduce(0, row[:, None].expand_as(s), s, "amax")


def normalised(
    s: Float[Tensor, "E H"],
    group: Tensor,
    n: int,
    *,
    weighting: Weighting,
    top: Float[Tensor, ""] | None,
) -> tuple[Float[Tensor, "E H"], Float[Tensor, "n 2 H"]]:
    """`p(s) / Σ p(s)` over the edges of each of `n` groups, and `norm`."""
    shape = n, s.shape[1]
    if weighting.normalizer == "softmax":
        # The maximum only keeps exp in range: it cancels, so it carries no gradient.
        shift = torch.full(shape, -math.inf, dtype=s.dtype, device=s.device)
        shift = shift.scatter_reduce(0, group[:, None].expand_as(s), s.detach(), "amax")
        p = torch.exp(s - shift[group])
    else:
        assert top is not None
        v = s - top.to(s.dtype)
        p = 2 / (torch.sqrt(v * v + 4) - v)
        shift = torch.zeros(shape, dtype=s.dtype, device=s.device)
    total = torch.zeros(shape, dtype=s.dtype, device=s.device).index_add(0, group, p)
    return p / total[group], torch.stack([shift, 1 / total], 1)


def edge_attention_fwd(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    mean_heads: bool,
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "E H"] | Float[Tensor, " E"], Float[Tensor, "N 2 H"]]:
    """Edge weights `a` in slot order (their mean over heads if `mean_heads`), and `norm`.

    `weighting` is the paper's unless given. `top` comes with the normaliser squareplus; `csr_t` is
    not needed here.
    """
    n, h, d_k = q.shape
    weighting = weighting or scaled_dot(d_k)
    row, col = edge_rows(csr), csr.col.long()
    s = edge_scores(
        q, k, weighting=weighting, edge_weight=edge_weight, receiver=row, sender=col
    )  # [E, H]
    group = row if weighting.normalize == "receiver" else col
    a, norm = normalised(s, group, n, weighting=weighting, top=top)
    return (a.mean(1) if mean_heads else a).to(q.dtype), norm


def cost(*, n: int, e: int, h: int, d_k: int, element_bytes: int, index_bytes: int = 4) -> Cost:
    """Bytes and flops of one forward call that writes the weights of all heads."""
    index = index_bytes * (n + 1 + e)
    written = element_bytes * e * h + 8 * n * h
    return Cost(
        bytes_min=index + written + element_bytes * 2 * n * h * d_k,
        bytes_max=index + written + element_bytes * (n + e) * h * d_k,
        flops=e * h * (2 * d_k + 3),
    )
