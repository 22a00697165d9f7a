"""What holds for every member of the family without a reference to compare with."""

import pytest
import torch

import grand_fast as gf
from grand_fast.ops import edge_attention
from grand_fast.testing import assert_close
from tests.conftest import BACKENDS
from tests.ops._family import (
    attention,
    diffusion,
    edges_of,
    members,
    problem,
    without_state,
)

pytestmark = pytest.mark.usefixtures("nan_filled")


@members(backend=BACKENDS)
def test_weights_of_a_group_sum_to_one(member, backend):
    edges, n = edges_of("hub")
    graph = gf.Graph.from_edge_index(edges, n, self_loops=1.0)
    sender, receiver = edges = graph.edge_index()
    inputs = without_state(problem(member, edges, n))
    a = attention(member, graph)(backend, **inputs)
    assert (a >= 0).all()
    sums = {
        name: torch.zeros(n, 3, dtype=torch.float64).index_add(0, group, a)
        for name, group in (("receiver", receiver), ("sender", sender))
    }
    assert_close("sums", sums.pop(member.normalize), torch.ones(n, 3, dtype=torch.float64))
    (other,) = sums.values()
    assert (other - 1).abs().max() > 0.1


@members(backend=BACKENDS)
def test_constants_rest_where_rows_sum_to_one(member, backend):
    edges, n = edges_of("loops")
    inputs = problem(member, edges, n, source=False)
    inputs["x"] = inputs["x"][:1].expand(n, 5)
    f = diffusion(member, gf.Graph.from_edge_index(edges, n))(backend, **inputs)
    if member.normalize == "receiver":
        assert f.abs().max() < 1e-14
    else:
        assert f.abs().max() > 0.1


@members(backend=BACKENDS)
def test_mass_is_kept_where_columns_sum_to_one(member, backend):
    edges, n = edges_of("loops")
    inputs = problem(member, edges, n, source=False)
    f = diffusion(member, gf.Graph.from_edge_index(edges, n))(backend, **inputs)
    mass = f.sum(0).abs().max()
    assert mass < 1e-13 if member.normalize == "sender" else mass > 0.1


@members(backend=BACKENDS)
def test_renumbering_permutes(member, backend):
    edges, n = edges_of("hub")
    inputs = problem(member, edges, n)
    order = torch.randperm(n)
    rank = torch.argsort(order)
    moved = {name: t[order] if name in ("x", "q", "k", "x0") else t for name, t in inputs.items()}
    graph = gf.Graph.from_edge_index(edges, n)
    renumbered = gf.Graph.from_edge_index(rank[edges], n)
    want = diffusion(member, graph)(backend, **inputs)
    assert_close("f", diffusion(member, renumbered)(backend, **moved), want[order])
    inputs, moved = without_state(inputs), without_state(moved)
    want = attention(member, graph)(backend, **inputs)  # in the user's order, which stays
    assert_close("a", attention(member, renumbered)(backend, **moved), want)


@members(backend=BACKENDS)
def test_the_order_of_the_edges_does_not_matter(member, backend):
    edges, n = edges_of("repeated")
    inputs = problem(member, edges, n)
    order = torch.randperm(edges.shape[1])
    moved = {**inputs, "edge_weight": inputs["edge_weight"][order]}
    want = diffusion(member, gf.Graph.from_edge_index(edges, n))(backend, **inputs)
    shuffled = gf.Graph.from_edge_index(edges[:, order], n)
    assert_close("f", diffusion(member, shuffled)(backend, **moved), want)


@members(where=lambda member: member.score == "scaled_dot", backend=BACKENDS)
def test_scores_count_from_the_largest(member, backend):
    """All shifted alike, they give the same weights."""
    edges, n = edges_of("hub")
    inputs = without_state(problem(member, edges, n, weights=False))
    one = torch.ones(n, 3, 1, dtype=torch.float64)
    shifted = {"q": torch.cat([inputs["q"], 7 * one], 2), "k": torch.cat([inputs["k"], one], 2)}
    inputs = {name: torch.cat([t, 0 * one], 2) for name, t in inputs.items()}
    a = attention(member, gf.Graph.from_edge_index(edges, n))
    assert_close("a", a(backend, **shifted), a(backend, **inputs))


@members(backend=BACKENDS)
def test_is_edge_attention_then_csr_diffusion(member, backend):
    edges, n = edges_of("hub")
    graph = gf.Graph.from_edge_index(edges, n)
    inputs = problem(member, edges, n)
    a = attention(member, graph, mean_heads=True)(backend, **without_state(inputs))
    state = {name: inputs[name] for name in ("x", "alpha", "beta", "x0")}
    want = gf.ops.csr_diffusion(a=a, graph=graph, backend=backend, **state)
    assert_close("f", diffusion(member, graph)(backend, **inputs), want)


@members()
def test_bitwise_repeatable_for_any_thread_count(member):
    edges, n = edges_of("hub", 200)
    graph = gf.Graph.from_edge_index(edges, n)
    inputs = {name: t.float() for name, t in problem(member, edges, n).items()}
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
            f = diffusion(member, graph)("cpu", **leaves)
            runs.append([f, *torch.autograd.grad(f.square().sum(), list(leaves.values()))])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@members()
def test_saves_nothing_of_edge_size(member):
    edges, n = edges_of("random")
    graph = gf.Graph.from_edge_index(edges, n)
    assert graph.num_edges == 200
    inputs = problem(member, edges, n, d=2, heads=1, d_k=2, weights=False)
    saved = []

    def pack(t):
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        diffusion(member, graph)("cpu", **{k: t.requires_grad_() for k, t in inputs.items()})
    assert max(saved) <= n * 4  # q and k as exp_kernel prepares them have two columns more


def test_names_stand_for_the_default_parameters(backend):
    edges, n = edges_of("random")
    graph = gf.Graph.from_edge_index(edges, n)
    q, k = torch.randn(2, n, 2, 1)
    for name, score in (("exp_kernel", gf.ops.ExpKernel()), ("gat", gf.ops.GAT())):
        by_name = edge_attention(q, k, graph, score=name, backend=backend)
        assert torch.equal(by_name, edge_attention(q, k, graph, score=score, backend=backend))
