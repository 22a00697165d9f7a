"""`projected_attention_diffusion` with every score, as one operator."""

import sys

import pytest
import torch

from grand_fast import ops
from grand_fast.kernels.cpu.dense import column_dots
from grand_fast.ops import _largest_score, _score_columns, projected_attention_diffusion
from grand_fast.ops.scores import SCORES
from grand_fast.testing import assert_close, random_graph
from tests._pairwise import pairwise

from ._problems import compare, normal

HEADS = 3


def score_of(name, sigma, lengthscale):
    return ops.ExpKernel(sigma, lengthscale) if name == "exp_kernel" else name


def inputs(graph, name, *, d=7, d_k=5):
    d_k = 1 if name == "gat" else d_k
    n = graph.num_nodes
    given = {
        "x": normal(n, d), "weight": normal(2 * HEADS * d_k, d, seed=1, scale=d**-0.5),
        "bias": normal(2 * HEADS * d_k, seed=2), "alpha": normal(d, seed=3),
        "beta": normal(seed=4), "x0": normal(n, d, seed=5), "y": normal(n, d, seed=6),
        "w": 1 + 0.3 * normal(graph.num_edges, seed=7),
    }  # fmt: skip
    if name == "exp_kernel":
        given |= {"sigma": torch.tensor(1.3), "lengthscale": torch.tensor([0.7])}
    return {key: value.double() for key, value in given.items()}


def call_of(graph, name, normalizer, normalize):
    def call(x, weight, bias, alpha, beta, x0, y, w, sigma=1.0, lengthscale=1.0, backend="cpu"):
        return projected_attention_diffusion(
            x, weight, bias, graph, heads=HEADS, alpha=alpha, beta=beta, x0=x0,
            score=score_of(name, sigma, lengthscale), normalizer=normalizer, normalize=normalize,
            edge_weight=w, add=[(0.5, x), (-2.0, y)], backend=backend,
        )  # fmt: skip

    return call


def keep(kept, monkeypatch):
    """Whether q and k are kept for backward."""
    module = sys.modules["grand_fast.ops.projected_attention_diffusion"]
    monkeypatch.setitem(vars(module), "_is_kept", lambda *given: kept)


KEPT = {"kept": True, "recomputed": False}


@pairwise(
    3,
    name=list(SCORES),
    normalizer=["softmax", "squareplus"],
    normalize=["receiver", "sender"],
    kind=["hub", "empty_rows", "no_edges"],
    kept=KEPT,
)
def test_against_the_reference(name, normalizer, normalize, kind, kept, monkeypatch):
    keep(kept, monkeypatch)
    graph = random_graph(kind)
    call = call_of(graph, name, normalizer, normalize)
    # The gradients by σ and of the largest score are sums over all edges that cancel
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-11}
    for dtype in (torch.float32, torch.float64):
        given = inputs(graph, name)
        compare(call, given, backend="cpu", dtype=dtype, tolerance=tolerance[dtype])


@pytest.mark.parametrize("elements", [1, 100])
@pytest.mark.parametrize("name", SCORES)
def test_scores_of_some_rows_at_a_time(name, elements, monkeypatch):
    monkeypatch.setattr(_score_columns, "SERIAL", elements)
    graph = random_graph("hub")
    call = call_of(graph, name, "squareplus", "sender")
    given = inputs(graph, name)
    compare(call, given, backend="cpu", dtype=torch.float64, tolerance=1e-11)


@pairwise(name=list(SCORES), normalizer=["softmax", "squareplus"], kept=KEPT)
def test_backward_twice(name, normalizer, kept, monkeypatch):
    """What the first backward writes over, the second does not need."""
    keep(kept, monkeypatch)
    graph = random_graph("hub")
    leaves = {key: t.requires_grad_() for key, t in inputs(graph, name).items()}
    f = call_of(graph, name, normalizer, "receiver")(**leaves)
    first, second = (
        torch.autograd.grad(f, list(leaves.values()), torch.ones_like(f), retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", SCORES)
def test_second_derivatives(name):
    graph = random_graph("path", n=4)
    given = inputs(graph, name, d=2, d_k=2)
    call = call_of(graph, name, "squareplus", "sender")
    names, leaves = list(given), [t.requires_grad_() for t in given.values()]
    first = torch.autograd.grad(call(**given).square().sum(), leaves, create_graph=True)
    assert all(g.requires_grad for g in first)  # gradgradcheck passes over those that do not

    def of_tensors(*tensors):
        return call(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradgradcheck(of_tensors, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["exp_kernel", "pearson"])
def test_compiles_whole(name):
    graph = random_graph("empty_rows")
    given = {key: t.float() for key, t in inputs(graph, name).items()}
    call = call_of(graph, name, "squareplus", "sender")
    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = {key: t.clone().requires_grad_() for key, t in given.items()}
        f = function(**leaves)
        results.append([f, *torch.autograd.grad(f.square().sum(), list(leaves.values()))])
    for key, got, want in zip(["f", *given], results[1], results[0], strict=True):
        assert_close(key, got, want, tolerance=2e-5)


@pytest.mark.parametrize("name", SCORES)
def test_gradients_of_a_score_are_those_of_autograd(name):
    """Also of vectors that are zero, or shorter than the cosine's eps."""
    q, k = normal(2, 9, HEADS, 1 if name == "gat" else 5)
    q[0], q[1], k[2] = 0, 1e-7 * q[1], 1e-7 * k[2]
    sigma, length = torch.tensor(1.3).double(), torch.tensor([0.7]).double()
    leaves = [t.requires_grad_() for t in (q, k, sigma, length)]
    score = SCORES[name] if name != "exp_kernel" else ops.ExpKernel(sigma, length)
    made = score.prepare(q, k)
    of_made = tuple(normal(*t.shape, seed=seed) for seed, t in enumerate(made))
    want = torch.autograd.grad(made, leaves, of_made, allow_unused=True)
    with torch.no_grad():
        got = score.gradients((q, k), made, tuple(t.clone() for t in of_made))
    for key, a, b in zip(("dq", "dk", "dsigma", "dlengthscale"), got, want, strict=True):
        assert (a is None) == (b is None), key
        if a is not None:
            assert_close(key, a, b, tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 1), (500, 7), (129, 150), (9000, 16)])
def test_column_dots(n, d, dtype):
    a, b = (normal(n, 2 * d, seed=seed).to(dtype)[:, :d] for seed in range(2))
    got = column_dots(a, b)
    assert_close("sums", got, (a.double() * b.double()).sum(0))
    assert torch.equal(got, column_dots(a, b))


def test_few_and_many_ties_give_one_gradient(monkeypatch):
    """Of two senders that are equally near, by whichever way the edges are looked through."""
    graph = random_graph("hub")
    given = inputs(graph, "cosine")
    given["x"] = given["x"][:1].expand(graph.num_nodes, -1).clone()  # all scores are equal
    given["w"] = torch.ones(graph.num_edges, dtype=torch.float64)
    grads = []
    for edges in (_largest_score._CHUNK, 1):
        monkeypatch.setattr(_largest_score, "_CHUNK", edges)
        of = {key: value.clone().requires_grad_() for key, value in given.items()}
        f = call_of(graph, "cosine", "squareplus", "receiver")(**of)
        weighted = f * normal(*f.shape, seed=9).double()
        grads.append(torch.autograd.grad(weighted.sum(), [of["weight"], of["x"], of["w"]]))
    for name, few, many in zip(("dweight", "dx", "dw"), *grads, strict=True):
        assert_close(name, few, many)


def test_tables_that_lie_side_by_side():
    whole = torch.randn(5, 2, 3, 4)
    q, k = whole.unbind(1)
    assert torch.equal(_score_columns.side_by_side(q, k), whole.view(5, 24))
    assert _score_columns.side_by_side(k, q) is None
    assert _score_columns.side_by_side(q.contiguous(), k.contiguous()) is None
    assert _score_columns.side_by_side(whole[:, 0], whole[:, 0, :2]) is None
    assert _score_columns.side_by_side(whole[:0, 0], whole[:0, 1]) is None
