"""Rows at the length from which they are cut: each is whole or in pieces, never both or neither."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from grand_fast import Graph
from grand_fast.kernels.cpu import rows
from grand_fast.kernels.cpu.language import Kernel
from grand_fast.ops import (
    attention_diffusion,
    attention_product,
    csr_diffusion,
    edge_attention,
    edge_softmax,
    projected_attention_diffusion,
    spmm,
)
from tests.ops._problems import compare, normal

# CUT_FROM, and edges of a graph: a row of 64 is whole for its length, one of 40 for its share of E
LIMITS = {"by length": (64, 3000, 64), "by share": (16, 5130, 40)}
HUBS = {"none longer": (-1, 0), "one longer": (-1, 0, 1), "many longer": (0, 1, 1, 30)}
# To what CPU kernels sum in another order than the reference
TOLERANCE = 1e-11


def edges_at(limit, more, e):
    """Receivers, from 0 on, and as many senders of `limit` and so many more edges; others fill up
    to `e` edges and have fewer."""
    n, k = 420, len(more)
    others = torch.arange(2 * k, n)
    parts = []
    for i, extra in enumerate(more):
        ends = others[torch.randint(0, len(others), (2, limit + extra))]
        parts.append(torch.stack([ends[0], torch.full_like(ends[0], i)]))
        parts.append(torch.stack([torch.full_like(ends[1], k + i), ends[1]]))
    rest = e - sum(p.shape[1] for p in parts)
    fill = others[torch.arange(rest) % len(others)]
    parts.append(torch.stack([fill, fill[torch.randperm(rest)]]))
    edges = torch.cat(parts, dim=1)
    return edges[:, torch.randperm(e)], n


@pytest.fixture(params=[(a, b) for a in LIMITS for b in HUBS], ids=" ".join)
def case(request, monkeypatch):
    """A graph, the edges of its longest row that is whole, and how many more some rows have."""
    of_limit, of_hubs = request.param
    cut_from, e, limit = LIMITS[of_limit]
    monkeypatch.setattr(rows, "CUT_FROM", cut_from)
    assert rows.longest_whole_row(e) == limit
    more = HUBS[of_hubs]
    graph = Graph.from_edge_index(*edges_at(limit, more, e))
    for rowptr in (graph.rowptr, graph.rowptr_t):
        top = rowptr.diff().sort(descending=True).values[: len(more) + 1] - limit
        assert top[: len(more)].tolist() == sorted(more, reverse=True) and int(top[-1]) < -1
    return graph, limit, more


@pytest.mark.parametrize("transposed", [False, True], ids=["A", "At"])
@pytest.mark.parametrize("ordered", [False, True], ids=["by_number", "in_an_order"])
def test_every_row_is_visited_once(case, transposed, ordered):
    graph, limit, _ = case
    if ordered:
        graph = visited(graph, torch.randperm(graph.num_nodes))
    view = graph.csr(rows.plan, transposed=transposed)
    work, degree = view.work, (graph.rowptr_t if transposed else graph.rowptr).diff().long()
    k = Kernel("count_rows", torch.float32, view.rowptr.dtype)
    with rows.each_row(k, pieces=False) as row:
        place = k.matrix("count").row(row.out)
        place.store(place.load(1) + k.splat(1.0), 1)
    count = torch.zeros(graph.num_nodes, 1)
    rows.Compiled(k)(work, pieces=False, count=count, rowptr=view.rowptr)
    assert torch.equal(count.flatten(), (degree <= limit).float())
    assert torch.equal(work.hub_rows.sort().values, (degree > limit).nonzero().flatten())
    # and the pieces of the others are all of their edges, in order
    for i, row in enumerate(work.hub_rows.tolist()):
        first, last = work.hub_pieces[i : i + 2].tolist()
        begins, ends = work.piece_begin[first:last], work.piece_end[first:last]
        start = int(view.rowptr[work.piece_position[first]])
        assert begins.tolist() == [start, *ends[:-1].tolist()]
        assert int(ends[-1]) == start + int(degree[row]) and bool((begins < ends).all())
        assert int((ends - begins).max()) <= rows.CUT_FROM


def visited(graph, order):
    graph = replace(graph, rowptr=graph.rowptr.clone())  # the views belong to the arrays
    graph._views["order"] = order
    return graph


def given_weights(graph, *, x, a, alpha, beta, x0, backend):
    add = [(0.5, x)]
    return csr_diffusion(x, a, graph, alpha=alpha, beta=beta, x0=x0, add=add, backend=backend)


def attention(graph, *, x, q, k, a, alpha, beta, x0, backend, **options):
    scales = {"alpha": alpha, "beta": beta, "x0": x0}
    return attention_diffusion(
        x, q, k, graph, **scales, edge_weight=a, add=[(0.5, x)], backend=backend, **options
    )


def projected(graph, *, x, weight, bias, alpha, backend):
    return projected_attention_diffusion(
        x, weight, bias, graph, heads=2, alpha=alpha, backend=backend
    )


def edges(graph, *, q, k, a, backend, **options):
    return edge_attention(q, k, graph, edge_weight=a, backend=backend, **options)


def products(graph, *, x, q, a, backend):
    """By one matrix, by several of shared vectors, and head by head."""
    by_head = torch.stack([a, a.square()], 1)
    parts = [spmm(graph, v, t, backend=backend) for v, t in ((a, x), (by_head, x), (by_head, q))]
    return torch.cat([part.flatten(1) for part in parts], 1)


def of_values(graph, *, x, q, k, a, backend, **options):
    """With tables of edges, where weights may have them."""
    values, table = x[:, None] * q[:, :, :1], a[:, None, None] * torch.ones(2, 3).to(a)
    keys = {} if options.get("normalizer") else {"edge_key": table}
    tables = keys | {"edge_value": a[:, None, None] * values[:1]}
    return attention_product(
        values, q, k, graph, edge_weight=a, backend=backend, **tables, **options
    )


def softmax(graph, *, q, backend, **options):
    sender, receiver = graph.edge_index()
    scores = q[sender, :, 0] + q[receiver, :, 1]
    return edge_softmax(scores, graph, backend=backend, **options)


STATE, QK = ("x", "alpha", "beta", "x0"), ("q", "k", "a")
OTHERS = {"normalizer": "squareplus", "normalize": "sender"}
CALLS = {
    "csr_diffusion": (given_weights, (*STATE, "a")),
    "attention_diffusion": (attention, STATE + QK),
    "attention_diffusion by sender": (partial(attention, **OTHERS), STATE + QK),
    "projected": (projected, ("x", "weight", "bias", "alpha")),
    "spmm": (products, ("x", "q", "a")),
    "attention_product": (of_values, ("x", *QK)),
    "attention_product by sender": (partial(of_values, reduce="cat", **OTHERS), ("x", *QK)),
    "edge_softmax": (softmax, ("q",)),
    "edge_softmax by sender": (partial(softmax, **OTHERS), ("q",)),
    "edge_attention": (edges, QK),
    "edge_attention mean": (partial(edges, mean_heads=True), QK),
    "edge_attention by sender": (partial(edges, **OTHERS), QK),
}


def inputs_of(graph, names, d=5):
    n = graph.num_nodes
    shapes = {
        "x": (n, d), "alpha": (d,), "beta": (d,), "x0": (n, d), "q": (n, 2, 3), "k": (n, 2, 3),
        "a": (graph.num_edges,), "weight": (12, d), "bias": (12,),
    }  # fmt: skip
    return {name: normal(*shapes[name], seed=i) for i, name in enumerate(names)}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("nan_filled")
def test_results_and_gradients_are_those_of_the_reference(case, name):
    graph, _, _ = case
    call, names = CALLS[name]
    given = inputs_of(graph, names)
    compare(partial(call, graph), given, backend="cpu", dtype=torch.float64, tolerance=TOLERANCE)


@pytest.mark.parametrize("d", [5, 33])
def test_rows_that_are_whole_are_summed_as_where_none_is_cut(case, d, monkeypatch):
    """To the bit; and those that are cut are not, or there was nothing to test."""
    graph, limit, more = case
    x, a = (t.float().requires_grad_() for t in inputs_of(graph, ("x", "a"), d).values())
    upstream = normal(graph.num_nodes, d, seed=9).float()
    found = []
    for longest in (limit, 1 << 30):
        monkeypatch.setattr(rows, "longest_whole_row", lambda e, longest=longest: longest)
        f = csr_diffusion(x, a, visited(graph, None), backend="cpu")
        found.append((f, torch.autograd.grad(f, x, upstream)[0]))
    for got, want, rowptr in zip(*found, (graph.rowptr, graph.rowptr_t), strict=True):
        is_whole = rowptr.diff() <= limit
        assert torch.equal(got[is_whole], want[is_whole])
        if max(more) > 0:
            assert not torch.equal(got[~is_whole], want[~is_whole])
