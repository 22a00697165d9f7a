"""One evaluation of the right-hand side as GRAND's released code writes it, for all its options.

It gathers a query and a key for each edge, normalises the scores by scatters, and multiplies by
torch_sparse's `spmm`, which is a gather, a product and a scatter too. Its unused projection of
values is left out, and the number of nodes need not be found by a maximum: to its advantage.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch_geometric.utils import scatter, softmax

from bench.core.configurations import Configuration

EPS = 1e-16  # added to the sum of each group
COSINE_EPS = 1e-5

# The layer's parameters, as `released_edge_attention` calls them.
PARAMETERS = {
    "query.weight": "W_q",
    "query.bias": "b_q",
    "key.weight": "W_k",
    "key.bias": "b_k",
    "sigma": "sigma",
    "lengthscale": "lengthscale",
    "scale.alpha_logit": "alpha",
    "scale.beta": "beta",
}

SparseProduct = Callable[[Tensor, Tensor], Tensor]
Attention = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def gathered_product(receiver: Tensor, sender: Tensor) -> SparseProduct:
    """`A x` of weights `a [E]` and `x [N, d]`: a row of x for each edge."""

    def product(a: Tensor, x: Tensor) -> Tensor:
        messages = x.index_select(0, sender) * a[:, None]
        return scatter(messages, receiver, dim_size=x.shape[0], reduce="sum")

    return product


def released_edge_attention(chosen: Configuration, receiver: Tensor, sender: Tensor) -> Attention:
    """The mean over heads of the attention at a state, `[E]`; parameters are named as inputs."""
    shape = chosen.shape
    group = receiver if chosen.normalize == "receiver" else sender

    def attention(x: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        n = x.shape[0]
        # [N, d_k, H]
        q, k = (
            linear(x, given[f"W_{name}"], given[f"b_{name}"])
            .view(n, shape.heads, shape.d_k)
            .transpose(1, 2)
            for name in "qk"
        )
        s = _scores(chosen.score, q[receiver], k[sender], given)
        if chosen.normalizer == "squareplus":
            return _square_plus(s, group, n).mean(1)
        return softmax(s, group, num_nodes=n).mean(1)

    return attention


def _scores(score: str, q: Tensor, k: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """[E, H] of rows [E, d_k, H]."""
    if score == "scaled_dot":
        return (q * k).sum(1) / math.sqrt(q.shape[1])
    if score == "exp_kernel":
        distance = ((q - k) ** 2).sum(1)
        return given["sigma"] ** 2 * torch.exp(-distance / (2 * given["lengthscale"] ** 2))
    if score == "pearson":
        q, k = q - q.mean(1, keepdim=True), k - k.mean(1, keepdim=True)
    return torch.cosine_similarity(q, k, dim=1, eps=COSINE_EPS)


def _square_plus(s: Tensor, group: Tensor, n: int) -> Tensor:
    v = s - s.max()
    p = (v + torch.sqrt(v**2 + 4)) / 2
    return p / (scatter(p, group, dim_size=n, reduce="sum")[group] + EPS)
