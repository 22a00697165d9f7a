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
from bench.core.problem import Function
from bench.peers.arrays import GraphArrays
from bench.peers.sparse import csr_product, mkl
from bench.tuned.problem import TunedProblem

EPS = 1e-16  # added to the sum of each group
COSINE_EPS = 1e-5

SparseProduct = Callable[[Tensor, Tensor], Tensor]
Attention = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def released_sequence(problem: TunedProblem) -> Function:
    """With torch_sparse's product: a row per edge."""
    return _sequence(problem, gathered_product(*problem.graph.edge_index().flip(0)))


def released_attention_csr_product(problem: TunedProblem) -> Function:
    """With MKL's product and a backward by hand: nothing of size E·d."""
    arrays, slots = GraphArrays(problem.graph), problem.graph.perm.long()

    def product(a: Tensor, x: Tensor) -> Tensor:
        return csr_product(x, a[slots], arrays, mkl(x.shape[1]))

    return _sequence(problem, product)


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
    normalise = _square_plus if chosen.normalizer == "squareplus" else _softmax

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
        return normalise(s, group, n).mean(1)

    return attention


def _sequence(problem: TunedProblem, product: SparseProduct) -> Function:
    attention = released_edge_attention(problem.configuration, *problem.graph.edge_index().flip(0))
    x0 = problem.x0

    def function(*inputs: Tensor) -> Tensor:
        x, *rest = inputs
        given = dict(zip(list(problem.inputs)[1:], rest, strict=True))
        f = torch.sigmoid(given["alpha"]) * (product(attention(x, given), x) - x)
        return f if x0 is None else f + given["beta"] * x0.to(x.dtype)

    return function


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


def _softmax(s: Tensor, group: Tensor, n: int) -> Tensor:
    return softmax(s, group, num_nodes=n)


def _square_plus(s: Tensor, group: Tensor, n: int) -> Tensor:
    v = s - s.max()
    p = (v + torch.sqrt(v**2 + 4)) / 2
    return p / (scatter(p, group, dim_size=n, reduce="sum")[group] + EPS)
