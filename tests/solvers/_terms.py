"""Diffusion terms for the tests of the methods that need a matrix, and their dense counterparts."""

import torch

from grand_fast.nn import AttentionDiffusion
from grand_fast.nn.terms import LinearDiffusion, NonlinearDiffusion
from grand_fast.solvers import ContinuousOptions
from grand_fast.testing import random_graph

ADJOINTS = ("direct", "checkpoint")
GRADIENTS = {
    "direct": {"adjoint": "direct"},
    "checkpoint": {"adjoint": "checkpoint"},
    "limited": {"memory_limit": 10**6},
    "continuous": {"adjoint": "continuous", "adjoint_options": ContinuousOptions(params=())},
    "regularized": {"regularizers": ["kinetic"]},
}


def row_stochastic(graph, *, dtype=torch.float64):
    """Random weights in CSR order, those of a receiver summing to 1."""
    rows = torch.arange(graph.num_nodes).repeat_interleave(graph.rowptr.diff())
    a = torch.rand(graph.num_edges, dtype=torch.float64) + 0.05
    sums = torch.zeros(graph.num_nodes, dtype=torch.float64).index_add(0, rows, a)
    return (a / sums[rows]).to(dtype)


def dense(a, graph):
    """A `[N, N]` of weights in CSR order, differentiable."""
    n = graph.num_nodes
    rows = torch.arange(n).repeat_interleave(graph.rowptr.diff())
    index = rows * n + graph.col
    return a.new_zeros(n * n).index_add(0, index, a).view(n, n)


def linear_problem(kind="loops", n=12, d=3, *, seed=0):
    """A graph, and leaves `x0, a, alpha, beta, source` that a term and a solve depend on."""
    torch.manual_seed(seed)
    graph = random_graph(kind, n)
    leaves = {
        "x0": torch.randn(n, d, dtype=torch.float64),
        "a": row_stochastic(graph),
        "alpha": torch.tensor(0.8, dtype=torch.float64),
        "beta": torch.tensor(0.3, dtype=torch.float64),
        "source": torch.randn(n, d, dtype=torch.float64),
    }
    return graph, leaves


def linear_term(graph, leaves):
    return LinearDiffusion(
        leaves["a"],
        graph,
        alpha=leaves["alpha"],
        beta=leaves["beta"],
        x0=leaves["source"],
    )


def nonlinear_problem(n=8, d=4, heads=2, *, seed=0):
    """A layer with a source, its graph and its parameters by name."""
    torch.manual_seed(seed)
    field = AttentionDiffusion(d, d, heads, source=True).double()
    with torch.no_grad():
        field.scale.beta.fill_(0.3)
    return field, random_graph("loops", n)


def nonlinear_term(field, graph, source):
    return NonlinearDiffusion(field, graph, source)
