"""The CPU kernels on the whole family of weights, against the float64 reference."""

import pytest
import torch

import grand_fast as gf
from grand_fast.kernels.cpu import rows
from grand_fast.ops import GAT, ExpKernel, attention_diffusion, edge_attention
from grand_fast.testing import assert_close, random_graph
from tests._pairwise import pairwise
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled")

SCORES = ("scaled_dot", "exp_kernel", "gat")  # one of each function of the dot product
SIDES = {"normalizer": ["softmax", "squareplus"], "normalize": ["receiver", "sender"]}
FAMILY = {"score": SCORES, **SIDES}
NO_YES = [False, True]
DTYPES = [torch.float32, torch.float64]


def problem(graph, score, *, weighted, d=5, heads=3, d_k=4, parameters=True):
    n = graph.num_nodes
    d_k = 1 if score == "gat" else d_k
    inputs = {"q": normal(n, heads, d_k, seed=2), "k": normal(n, heads, d_k, seed=3)}
    if d:
        inputs |= {"x": normal(n, d, seed=1), "alpha": normal(d, seed=4)}
    if score == "exp_kernel" and parameters:
        inputs |= {"sigma": torch.tensor(1.5), "lengthscale": torch.tensor(2.0)}
    if weighted:
        inputs["edge_weight"] = normal(graph.num_edges, seed=5)
    return inputs


def run(graph, score, normalizer, normalize, **options):
    """`attention_diffusion` if there is a state, else `edge_attention`."""

    def call(q, k, backend, x=None, alpha=1.0, sigma=1.5, lengthscale=2.0, edge_weight=None):
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


def check(graph, case, dtype, *, options=None, tolerance=None, **sizes):
    """Against the reference, with every gradient.

    In float32 without those by the parameters of a score: sums over all nodes that cancel, in torch
    itself. Of squareplus, one edge gets the sum of the gradients by all scores, which cancels too.
    """
    score, normalizer, normalize = case
    inputs = problem(graph, score, parameters=dtype == torch.float64, **sizes)
    if dtype == torch.float32 and normalizer == "squareplus":
        tolerance = tolerance or 2e-5
    call = run(graph, score, normalizer, normalize, **(options or {}))
    compare(call, inputs, backend="cpu", dtype=dtype, tolerance=tolerance)


@pairwise(3, **FAMILY, weighted=NO_YES, dtype=DTYPES)
def test_diffusion(score, normalizer, normalize, weighted, dtype):
    check(random_graph("hub"), (score, normalizer, normalize), dtype, weighted=weighted)


@pairwise(3, **FAMILY, mean_heads=NO_YES, weighted=NO_YES, dtype=DTYPES)
def test_edge_attention(mean_heads, score, normalizer, normalize, weighted, dtype):
    graph, case = random_graph("empty_rows"), (score, normalizer, normalize)
    check(graph, case, dtype, weighted=weighted, d=0, options={"mean_heads": mean_heads})


# Sums of more channels than fit the registers
@pairwise(**SIDES, dtype=DTYPES)
def test_wide_rows(normalizer, normalize, dtype):
    graph, case = random_graph("random"), ("exp_kernel", normalizer, normalize)
    for channels in (300, 0):
        check(graph, case, dtype, weighted=True, d=channels, heads=1, d_k=70)


# Heads narrower than a register: several of them, or several edges too, share one
NARROW = [(1, 1), (3, 1), (4, 2), (3, 2), (9, 2), (20, 2), (2, 4), (8, 4), (17, 4), (5, 8),
          (16, 8), (3, 6), (2, 12)]  # fmt: skip


@pairwise(normalize=SIDES["normalize"], shape=NARROW, dtype=DTYPES)
def test_narrow_heads(normalize, shape, dtype):
    heads, d_k = shape
    graph, case = random_graph("hub"), ("scaled_dot", "squareplus", normalize)
    # Of so few channels, all terms of a sum may cancel
    tolerance = 1e-4 if dtype == torch.float32 else None
    for weighted, d in ((True, 16), (False, 0)):
        sizes = {"d": d, "heads": heads, "d_k": d_k}
        check(graph, case, dtype, weighted=weighted, tolerance=tolerance, **sizes)


@pairwise(**FAMILY, needed=["x", "q", "k", "alpha", "edge_weight"])
def test_one_gradient_alone(needed, score, normalizer, normalize):
    graph = random_graph("random")
    inputs = problem(graph, score, weighted=True)
    grads = []
    for backend in ("cpu", "reference"):
        leaf = inputs[needed].clone().requires_grad_()
        f = run(graph, score, normalizer, normalize)(**{**inputs, needed: leaf}, backend=backend)
        grads.append(torch.autograd.grad(f.square().sum(), leaf)[0])
    assert_close(f"d{needed}", *grads)


def hub_graph():
    """Node 1 receives from, and node 2 sends to, more edges than a piece has."""
    n = rows.CUT_FROM + 1000
    others = torch.arange(n)
    sender = torch.cat([others, torch.full((n,), 2), torch.tensor([2, 2])])
    receiver = torch.cat([torch.full((n,), 1), others, torch.tensor([1, 1])])
    return gf.Graph.from_edge_index(torch.stack([sender, receiver]), n)


@pytest.mark.parametrize("normalizer", ["softmax", "squareplus"])
@pytest.mark.parametrize("normalize", ["receiver", "sender"])
def test_rows_that_are_cut(normalizer, normalize):
    graph = hub_graph()
    for transposed in (False, True):
        assert graph.csr(rows.plan, transposed=transposed).work.piece_begin.numel() > 1
    for options in (None, {}, {"mean_heads": True}):
        d = 5 if options is None else 0
        # Sums over 15,000 edges and heads that cancel
        sizes = {"weighted": True, "d": d, "options": options, "tolerance": 1e-10}
        check(graph, ("exp_kernel", normalizer, normalize), torch.float64, **sizes)


@pytest.mark.parametrize("normalize", ["receiver", "sender"])
def test_bitwise_repeatable_for_any_thread_count(normalize):
    graph = hub_graph()
    inputs = {k: t.float() for k, t in problem(graph, "scaled_dot", weighted=True).items()}
    call = run(graph, "scaled_dot", "squareplus", normalize)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
            f = call(**leaves, backend="cpu")
            runs.append([f, *torch.autograd.grad(f.square().sum(), list(leaves.values()))])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
