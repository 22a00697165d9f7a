from functools import partial

import pytest
import torch

from grand_fast.ops import csr_diffusion
from grand_fast.testing import GRAPH_KINDS, assert_close, random_graph
from tests.ops._problems import compare, compare_added, compare_one_gradient, normal

pytestmark = pytest.mark.usefixtures("nan_filled")


def problem(graph, d):
    n = graph.num_nodes
    return {
        "x": normal(n, d, seed=1),
        "a": normal(graph.num_edges, seed=2),
        "alpha": normal(d, seed=4),
        "beta": normal(d, seed=5),
        "x0": normal(n, d, seed=6),
    }


def run(graph, edge_order="user"):
    def call(x, a, alpha, beta, x0, backend):
        return csr_diffusion(
            x, a, graph, alpha=alpha, beta=beta, x0=x0, edge_order=edge_order, backend=backend
        )

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("d", [1, 3, 16, 31, 64, 162, 300])
def test_forward_and_backward(d, dtype):
    graph = random_graph("hub")
    compare(run(graph), problem(graph, d), backend="cpu", dtype=dtype)


@pytest.mark.parametrize("order", ["user", "csr"])
@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_graphs(kind, order):
    graph = random_graph(kind)
    compare(run(graph, order), problem(graph, 5), backend="cpu", dtype=torch.float32)


def test_against_a_dense_matrix(backend):
    graph = random_graph("repeated")
    p = problem(graph, 4)
    sender, receiver = graph.edge_index()
    dense = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    dense.index_put_((receiver, sender), p["a"], accumulate=True)
    want = p["alpha"] * (dense @ p["x"] - p["x"]) + p["beta"] * p["x0"]
    assert_close("f", run(graph)(**p, backend=backend), want)


def test_csr_order_is_the_user_order_permuted(backend):
    graph = random_graph("hub")
    p = problem(graph, 4)
    slots = {**p, "a": p["a"][graph.perm.long()]}
    want = run(graph)(**p, backend=backend)
    assert torch.equal(run(graph, "csr")(**slots, backend=backend), want)


def test_gradcheck(backend):
    graph = random_graph("empty_rows", 8)
    inputs = tuple(t.requires_grad_() for t in problem(graph, 3).values())
    assert torch.autograd.gradcheck(lambda *p: run(graph)(*p, backend=backend), inputs)


@pytest.mark.parametrize("needed", ["x", "a", "alpha", "beta", "x0"])
def test_one_gradient_alone(backend, needed):
    graph = random_graph("random")
    compare_one_gradient(run(graph), problem(graph, 4), needed, backend)


def test_repeatable():
    graph = random_graph("hub", 200)
    p = {k: t.float().requires_grad_() for k, t in problem(graph, 33).items()}
    runs = []
    for _ in range(2):
        f = run(graph)(**p, backend="cpu")
        runs.append([f, *torch.autograd.grad(f.square().sum(), list(p.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["hub", "empty_rows", "empty"])
def test_added_tensors(kind):
    graph = random_graph(kind)
    compare_added(partial(csr_diffusion, graph=graph), problem(graph, 5))


@pytest.mark.slow
def test_arxiv(arxiv):
    compare(run(arxiv), problem(arxiv, 8), backend="cpu", dtype=torch.float32)


def test_bad_input():
    graph = random_graph("random")
    p = problem(graph, 4)
    e = graph.num_edges
    with pytest.raises(ValueError, match=rf"`a` .*\[E\] = \[{e}\], got \[{e}, 8\].*a\.mean\(1\)"):
        csr_diffusion(p["x"], p["a"][:, None].expand(e, 8), graph)
    with pytest.raises(TypeError, match=r"`x0` must be torch.float64.*\.to\("):
        csr_diffusion(p["x"], p["a"], graph, beta=1.0, x0=p["x0"].float())
    with pytest.raises(ValueError, match="`edge_order` must be one of user, csr"):
        csr_diffusion(p["x"], p["a"], graph, edge_order="coo")
