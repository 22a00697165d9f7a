"""Every member of the family against its formulas on dense arrays, forward and every gradient."""

import pytest
import torch

import grand_fast as gf
from grand_fast.kernels.cpu import rows
from grand_fast.testing import assert_close
from tests._pairwise import pairwise
from tests.conftest import BACKENDS
from tests.ops._family import (
    FAMILY,
    compare_attention,
    compare_diffusion,
    dense_attention,
    diffusion,
    edges_of,
    members,
    problem,
)
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

REFERENCE, F64, F32 = (
    ("reference", torch.float64),
    ("cpu", torch.float64),
    ("cpu", torch.float32),
)
RUNS = {"reference": REFERENCE, "cpu-float64": F64, "cpu-float32": F32}
YES_NO = [True, False]
GRAPHS = ("random", "empty_rows", "repeated", "loops")
# d, H, d_k: odd, prime, wider than a register, one of each, more heads than lanes
SHAPES = [(1, 1, 2), (3, 1, 5), (7, 5, 3), (33, 2, 16), (16, 8, 4), (130, 1, 64), (20, 20, 2)]


# Scores of up to 10 are subtracted from another, and their gradients cancel in turn.
TOLERANCES = {torch.float64: 5e-12, torch.float32: 5e-5}


@members(3, run=RUNS, weights=YES_NO, source=YES_NO)
def test_diffusion(member, run, weights, source):
    edges, n = edges_of("hub")
    inputs = problem(member, edges, n, weights=weights, source=source)
    check_diffusion(member, edges, n, inputs, run)


@members(run=RUNS, kind=GRAPHS)
def test_diffusion_on_other_graphs(member, kind, run):
    edges, n = edges_of(kind)
    check_diffusion(member, edges, n, problem(member, edges, n), run)


@members()
def test_long_rows_are_cut_and_joined(member, monkeypatch):
    monkeypatch.setattr(rows, "CUT_FROM", 64)
    edges, n = edges_of("hub")
    assert edges[0].bincount().max() > 3 * 64 and edges[1].bincount().max() > 3 * 64
    check_diffusion(member, edges, n, problem(member, edges, n), F64)
    check_attention(member, edges, n, F64, mean_heads=False)


@pytest.mark.parametrize(
    ("member", "shape", "run"),
    [(m, SHAPES[i % 7], (F32, F64)[i % 2]) for i, m in enumerate(FAMILY)],
    ids=["{}-d{}-H{}-k{}".format(m, *SHAPES[i % 7]) for i, m in enumerate(FAMILY)],
)
def test_diffusion_of_other_shapes(member, shape, run):
    """Every shape in both types; every member once."""
    edges, n = edges_of("hub")
    d, heads, d_k = shape
    check_diffusion(member, edges, n, problem(member, edges, n, d=d, heads=heads, d_k=d_k), run)


@members(where=lambda member: member.score in ("scaled_dot", "pearson"), run=RUNS)
def test_non_contiguous_input(member, run):
    """Heads or channels apart, which some scores hand on as they are."""
    edges, n = edges_of("random")
    inputs = problem(member, edges, n)
    apart = {name: columns_apart(t) for name, t in inputs.items() if t.dim() > 1}
    assert not any(t.is_contiguous() for t in apart.values())
    check_diffusion(member, edges, n, inputs | apart, run)


def columns_apart(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def check_diffusion(member, edges, n, inputs, run):
    compare_diffusion(member, edges, n, inputs, *run, TOLERANCES[run[1]])


@members(3, run={"reference": REFERENCE, "cpu": F64}, mean_heads=YES_NO)
def test_attention(member, run, mean_heads):
    edges, n = edges_of("hub")
    check_attention(member, edges, n, run, mean_heads=mean_heads)


@members(run=RUNS, kind=["empty_rows", "repeated"])
def test_attention_on_other_graphs(member, kind, run):
    edges, n = edges_of(kind)
    check_attention(member, edges, n, run, mean_heads=False)


def check_attention(member, edges, n, run, *, mean_heads):
    inputs = problem(member, edges, n)
    compare_attention(member, edges, n, inputs, *run, TOLERANCES[run[1]], mean_heads=mean_heads)


@pairwise(normalizer=["softmax", "squareplus"], slope=[0.0, 0.2, 1.5, -0.3], backend=BACKENDS)
def test_slope_of_gat(normalizer, slope, backend):
    edges, n = edges_of("random")
    graph = gf.Graph.from_edge_index(edges, n)
    inputs = {"q": normal(n, 2, 1, seed=1), "k": normal(n, 2, 1, seed=2)}
    member = FAMILY[-4]._replace(normalizer=normalizer)
    assert member.score == "gat"

    def call(q, k, backend):
        options = member._asdict() | {"score": gf.ops.GAT(negative_slope=slope)}
        return gf.ops.edge_attention(q, k, graph, backend=backend, **options)

    def dense(q, k):
        return dense_attention(member, edges)(q=q, k=k, negative_slope=slope)

    compare(call, inputs, backend=backend, dtype=torch.float64, specification=dense)


@pairwise(score=["cosine", "pearson"], run=RUNS)
def test_short_vectors_keep_their_length(score, run):
    """Below eps = 1e-5 vectors are divided by eps, not by their length."""
    member = next(m for m in FAMILY if m.score == score)
    edges, n = edges_of("random")
    inputs = problem(member, edges, n)
    inputs["q"] *= torch.logspace(-9, 0, n, dtype=torch.float64)[:, None, None]
    inputs["k"][::3] *= 1e-6
    check_diffusion(member, edges, n, inputs, run)


@members(backend=BACKENDS)
def test_gradcheck(member, backend):
    edges, n = edges_of("empty_rows", 8)
    inputs = problem(member, edges, n)
    call = diffusion(member, gf.Graph.from_edge_index(edges, n))

    def of_tensors(*tensors):
        return call(backend=backend, **dict(zip(inputs, tensors, strict=True)))

    leaves = tuple(t.requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(of_tensors, leaves, fast_mode=True)


@members(where=lambda member: member.score == "exp_kernel", backend=BACKENDS)
def test_one_gradient_alone(member, backend):
    """What a backward skips must not change what it computes."""
    edges, n = edges_of("random", 12)
    graph = gf.Graph.from_edge_index(edges, n)
    inputs = problem(member, edges, n)
    f = diffusion(member, graph)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    want = torch.autograd.grad(f(backend, **leaves).square().sum(), list(leaves.values()))
    for name, of_all in zip(inputs, want, strict=True):
        leaf = inputs[name].clone().requires_grad_()
        out = f(backend, **{**inputs, name: leaf})
        (alone,) = torch.autograd.grad(out.square().sum(), leaf)
        assert_close(f"d{name}", alone, of_all)
