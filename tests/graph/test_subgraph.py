"""`Graph.keep_edges` against the graph that is sorted anew."""

from dataclasses import replace

import pytest
import torch

import grand_fast as gf
from grand_fast import Graph, ops
from grand_fast.testing import GRAPH_KINDS, random_edge_index, random_graph

ARRAYS = ("rowptr", "col", "rowptr_t", "col_t", "perm", "perm_t")


def masks(e):
    none = torch.zeros(e, dtype=torch.bool)
    first = none.clone()
    first[:1] = True
    return {"half": torch.rand(e) < 0.5, "most": torch.rand(e) < 0.95, "none": none,
            "all": ~none, "first": first}  # fmt: skip


def weighted(kind):
    edges, n = random_edge_index(kind)
    weight = torch.rand(edges.shape[1], dtype=torch.float64)
    return edges, n, weight


@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_arrays_are_those_of_the_graph_built_anew(kind, monkeypatch):
    edges, n, weight = weighted(kind)
    for name, mask in masks(edges.shape[1]).items():
        want = Graph.from_edge_index(edges[:, mask], n, weight[mask])
        graph = Graph.from_edge_index(edges, n, weight)
        with monkeypatch.context() as patched:
            for sort in ("sort", "argsort"):  # never again
                patched.setattr(torch, sort, None)
            got = graph.keep_edges(mask)
        for array in ARRAYS:
            kept, anew = getattr(got, array), getattr(want, array)
            assert kept.dtype == anew.dtype and torch.equal(kept, anew), (name, array)
        assert torch.equal(got.edge_weight, want.edge_weight)
        assert torch.equal(got.edge_index(), edges[:, mask])
        assert graph.num_edges == edges.shape[1] and (got is graph) == bool(mask.all())


def test_of_a_subgraph_and_without_weights():
    edges, n = random_edge_index("hub")
    first = torch.rand(edges.shape[1]) < 0.7
    second = torch.rand(int(first.sum())) < 0.3
    got = Graph.from_edge_index(edges, n).keep_edges(first).keep_edges(second)
    assert torch.equal(got.edge_index(), edges[:, first][:, second]) and got.edge_weight is None


def test_wide_indices_become_narrow_where_they_can():
    graph = random_graph("random")
    wide = Graph(*(getattr(graph, array).long() for array in ARRAYS))
    mask = torch.rand(graph.num_edges) < 0.5
    got, want = wide.keep_edges(mask), graph.keep_edges(mask)
    for array in ARRAYS:
        assert getattr(got, array).dtype == torch.int32
        assert torch.equal(getattr(got, array), getattr(want, array))


def results(graph, t):
    """Outputs and every gradient of the operators, per edge with values of all edges."""
    leaves = {name: value.clone().requires_grad_() for name, value in t.items()}
    x, q, k, a, w = (leaves[name] for name in ("x", "q", "k", "a", "w"))
    outputs = [
        ops.csr_diffusion(x, a, graph, alpha=0.3),
        ops.attention_diffusion(x, q, k, graph),
        ops.attention_diffusion(x, q, k, graph, score="exp_kernel", normalizer="squareplus",
                                normalize="sender", edge_weight=w),
        ops.edge_attention(q, k, graph, mean_heads=True),
    ]  # fmt: skip
    loss = sum((y * torch.linspace(1, 2, y.numel()).view_as(y)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("order", [False, True], ids=["by_number", "in_an_order"])
@pytest.mark.parametrize("kind", ["hub", "empty_rows", "repeated"])
def test_operators_agree_bit_for_bit(backend, kind, order):
    edges, n = random_edge_index(kind)
    graph, mask = Graph.from_edge_index(edges, n), torch.rand(edges.shape[1]) < 0.6
    if order:  # as a large graph has one, which its subgraphs take over
        graph = replace(graph, rowptr=graph.rowptr.clone())
        graph._views["order"] = torch.randperm(n)
    e = int(mask.sum())
    t = {"x": torch.randn(n, 7), "q": torch.randn(n, 2, 3), "k": torch.randn(n, 2, 3),
         "a": torch.rand(e), "w": 0.5 + torch.rand(e)}  # fmt: skip
    with gf.backend(backend):
        results(graph, t | {"a": torch.rand(edges.shape[1]), "w": torch.rand(edges.shape[1])})
        kept, anew = graph.keep_edges(mask), Graph.from_edge_index(edges[:, mask], n)
        if order:  # sums over all rows, as of dalpha, go by it
            assert kept._views["order"] is graph._views["order"]
            anew._views["order"] = graph._views["order"]
        got, want = results(kept, t), results(anew, t)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_an_order_that_was_not_sought_is_not_sought_now(monkeypatch):
    monkeypatch.setattr("grand_fast.graph.graph.visiting_order", None)
    graph = random_graph("random")
    assert "order" not in graph.keep_edges(torch.rand(graph.num_edges) < 0.5)._views


def test_weights_keep_their_gradient():
    edges, n, weight = weighted("random")
    weight.requires_grad_()
    mask = torch.rand(edges.shape[1]) < 0.5
    kept = Graph.from_edge_index(edges, n, weight).keep_edges(mask)
    (grad,) = torch.autograd.grad(kept.edge_weight.sum(), weight)
    assert torch.equal(grad, mask.double())


def test_with_edge_weight_shares_the_arrays():
    edges, n, weight = weighted("random")
    graph = Graph.from_edge_index(edges, n)
    got = graph.with_edge_weight(weight)
    assert got.edge_weight is weight and graph.edge_weight is None
    assert all(getattr(got, array) is getattr(graph, array) for array in ARRAYS)
    assert got._views is graph._views
    assert got.with_edge_weight(None).edge_weight is None
    with pytest.raises(ValueError, match=r"`edge_weight` must have shape \[E\] = \[200\]"):
        graph.with_edge_weight(weight[1:])
    with pytest.raises(TypeError, match="`edge_weight` must be a floating tensor"):
        graph.with_edge_weight(weight.long())


def test_bad_masks():
    graph = random_graph("random")
    mask = torch.ones(graph.num_edges, dtype=torch.bool)
    with pytest.raises(
        TypeError, match="`mask` must be a boolean tensor, got torch.int64. Compare"
    ):
        graph.keep_edges(torch.arange(3))
    with pytest.raises(TypeError, match="`mask` must be a boolean tensor, got list"):
        graph.keep_edges([True])
    with pytest.raises(ValueError, match=r"`mask` must have shape \[E\] = \[200\], got \[199\]"):
        graph.keep_edges(mask[1:])
    with pytest.raises(ValueError, match="`mask` must be on the graph's device, cpu, got meta"):
        graph.keep_edges(mask.to("meta"))
