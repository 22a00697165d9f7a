"""The whole family from its formulas alone, on dense arrays: what every backend is held against.

Nothing of the package is used. `s`, `p` and `a` are `[N, N, H, M]`: receiver, sender, head, and
which of the M edges between two nodes; `edge[i, j, :, m]` tells where there is one. Made for
float64 and graphs of some tens of nodes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

SCORES = ("scaled_dot", "cosine", "pearson", "exp_kernel", "gat")
NORMALIZERS = ("softmax", "squareplus")
DIRECTIONS = ("receiver", "sender")
FAMILY = [(s, p, g) for s in SCORES for p in NORMALIZERS for g in DIRECTIONS]


def node_scores(
    q: Tensor,
    k: Tensor,
    score: str,
    *,
    sigma: float | Tensor = 1.0,
    lengthscale: float | Tensor = 1.0,
    negative_slope: float = 0.2,
) -> Tensor:
    """Scores of all pairs of nodes, `[N, N, H]`, whether or not an edge joins them."""
    if score == "pearson":
        q, k = q - q.mean(2, keepdim=True), k - k.mean(2, keepdim=True)
    q_i, k_j = q[:, None], k[None]  # [N, 1, H, d_k], [1, N, H, d_k]
    if score == "scaled_dot":
        return (q_i * k_j).sum(3) / q.shape[2] ** 0.5
    if score in ("cosine", "pearson"):
        # As torch.nn.CosineSimilarity, whose gradient below eps is not that of its value.
        lengths = q_i.norm(dim=3).clamp_min(1e-5) * k_j.norm(dim=3).clamp_min(1e-5)
        return (q_i * k_j).sum(3) / lengths
    if score == "exp_kernel":
        distance2 = (q_i - k_j).square().sum(3)
        return sigma**2 * torch.exp(-distance2 / (2 * lengthscale**2))
    assert score == "gat"
    return leaky_relu((q_i + k_j)[..., 0], negative_slope)


def _multiplicity(edges: Tensor) -> Tensor:
    """`[E]`: how many edges of the same two nodes come before each."""
    seen: dict[tuple[int, int], int] = {}
    which = []
    for pair in zip(*edges.tolist(), strict=True):
        which.append(seen.get(pair, 0))
        seen[pair] = which[-1] + 1
    return torch.tensor(which, dtype=torch.int64)


def edge_attention(q: Tensor, k: Tensor, edges: Tensor, **options: Any) -> Tensor:
    """The weights `[E, H]` of `edges [2, E]`, row 0 sends and row 1 receives, in their order."""
    a, index = _attention(q, k, edges, **options)
    return a[index[0], index[1], :, index[2]]


def attention_diffusion(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    edges: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor | None = None,
    x0: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`f = alpha (mean_h A^h x − x) + beta x0`, `[N, d]`."""
    a, _ = _attention(q, k, edges, **options)
    f = alpha * (a.sum(3).mean(2) @ x - x)
    return f if beta is None or x0 is None else f + beta * x0


def _attention(
    q: Tensor,
    k: Tensor,
    edges: Tensor,
    *,
    score: str,
    normalizer: str,
    normalize: str,
    edge_weight: Tensor | None = None,
    **parameters: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """`a [N, N, H, M]`, 0 where there is no edge, and where in it the edges are."""
    n, h = q.shape[:2]
    which = _multiplicity(edges)
    index = (edges[1], edges[0], which)
    m = int(which.max()) + 1 if which.numel() else 0
    if m == 0:
        return q.new_zeros(n, n, h, 0), index
    edge = torch.zeros(n, n, m, dtype=torch.bool).index_put(index, torch.tensor(True))[:, :, None]
    s = node_scores(q, k, score, **parameters)[..., None].expand(n, n, h, m)
    if edge_weight is not None:
        weight = q.new_zeros(n, n, m).index_put(index, edge_weight)
        s = s * weight[:, :, None]
    group = (1, 3) if normalize == "receiver" else (0, 3)
    if normalizer == "softmax":
        largest = s.detach().masked_fill(~edge, -torch.inf).amax(group, keepdim=True)
        u = s - torch.where(largest.isinf(), 0.0, largest)  # cancels
        p = torch.exp(u.masked_fill(~edge, -torch.inf))
    else:
        u = s - s.masked_fill(~edge, -torch.inf).max()
        p = ((u + torch.sqrt(u.square() + 4)) / 2).masked_fill(~edge, 0.0)
    total = p.sum(group, keepdim=True)
    return p / torch.where(total == 0, 1.0, total), index
