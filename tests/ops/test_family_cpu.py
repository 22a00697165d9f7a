"""The CPU kernels on the whole family of weights, against the float64 reference."""

import itertools

import pytest
import torch

from grand_fast.kernels import _cpu
from grand_fast.ops import GAT, ExpKernel, attention_diffusion, edge_attention
from grand_fast.testing import random_graph
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled")

SCORES = ("scaled_dot", "exp_kernel", "gat")  # one of each function of the dot product
FAMILY = list(itertools.product(SCORES, ("softmax", "squareplus"), ("receiver", "sender")))
family = pytest.mark.parametrize(
    ("score", "normalizer", "normalize"), FAMILY, ids=["-".join(f) for f in FAMILY]
)
weights = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def problem(graph, score, *, weighted, d=5, heads=3, d_k=4):
    n = graph.num_nodes
    d_k = 1 if score == "gat" else d_k
    inputs = {"q": normal(n, heads, d_k, seed=2), "k": normal(n, heads, d_k, seed=3)}
    if d:
        inputs |= {"x": normal(n, d, seed=1), "alpha": normal(d, seed=4)}
    if score == "exp_kernel":
        inputs |= {"sigma": torch.tensor(1.5), "lengthscale": torch.tensor(2.0)}
    if weighted:
        inputs["edge_weight"] = normal(graph.num_edges, seed=5)
    return inputs


def run(graph, score, normalizer, normalize, **options):
    """`attention_diffusion` if there is a state, else `edge_attention`."""

    def call(q, k, backend, x=None, alpha=1.0, sigma=None, lengthscale=None, edge_weight=None):
        scores = {"gat": lambda: GAT(0.3), "exp_kernel": lambda: ExpKernel(sigma, lengthscale)}
        family = {
            "score": scores.get(score, lambda: score)(),
            "normalizer": normalizer,
            "normalize": normalize,
            "edge_weight": edge_weight,
            "backend": backend,
        }
        if x is None:
            return edge_attention(q, k, graph, **family, **options)
        return attention_diffusion(x, q, k, graph, alpha=alpha, **family, **options)

    return call


@dtypes
@weights
@family
@pytest.mark.parametrize("kind", ["hub", "empty_rows", "repeated"])
def test_diffusion(kind, score, normalizer, normalize, weighted, dtype):
    graph = random_graph(kind)
    inputs = problem(graph, score, weighted=weighted)
    compare(run(graph, score, normalizer, normalize), inputs, backend="cpu", dtype=dtype)


@dtypes
@weights
@family
@pytest.mark.parametrize("mean_heads", [False, True], ids=["heads", "mean"])
def test_edge_attention(mean_heads, score, normalizer, normalize, weighted, dtype):
    graph = random_graph("empty_rows")
    inputs = problem(graph, score, weighted=weighted, d=0)
    call = run(graph, score, normalizer, normalize, mean_heads=mean_heads)
    compare(call, inputs, backend="cpu", dtype=dtype)
