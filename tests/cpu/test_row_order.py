"""The order in which rows are visited: it changes no result, and is used only where it helps."""

from dataclasses import replace

import pytest
import torch

from grand_fast import Graph, backend, ops
from grand_fast.kernels.cpu import row_order, rows
from grand_fast.testing import assert_close, random_edge_index

N = 1 << 15  # the smallest graph for which an order is sought


def awkward() -> Graph:
    """Rows without edges, and hubs in `A` and in `Aᵀ`, long enough to be cut; not symmetric."""
    edges, n = random_edge_index("empty_rows", 300)
    others = torch.randint(8, n - 2, (4, 2 * rows.CUT_FROM + 9))
    receive = torch.stack([others[:2], torch.tensor([[20], [21]]).expand_as(others[:2])], 1)
    send = torch.stack([torch.tensor([[30], [31]]).expand_as(others[2:]), others[2:]], 1)
    edges = torch.cat([edges, *receive, *send], dim=1)
    return Graph.from_edge_index(edges[:, torch.randperm(edges.shape[1])], n)


def visited(graph: Graph, order: torch.Tensor | None) -> Graph:
    graph = replace(graph, rowptr=graph.rowptr.clone())  # the views belong to the arrays
    graph._views["order"] = order
    return graph


def attention(graph, *, x, q, k, alpha, beta, x0, a):
    return ops.attention_diffusion(x, q, k, graph, alpha=alpha, beta=beta, x0=x0, add=[(0.5, x)])


def given_weights(graph, *, x, q, k, alpha, beta, x0, a):
    return ops.csr_diffusion(x, a, graph, alpha=alpha, beta=beta, x0=x0, add=[(0.5, x)])


def weights(graph, *, x, q, k, alpha, beta, x0, a):
    return ops.edge_attention(q, k, graph)


def mean_weights(graph, *, x, q, k, alpha, beta, x0, a):
    return ops.edge_attention(q, k, graph, mean_heads=True)


def sums_of_values(graph, x, q, a, **_):
    table = a[:, None, None] * torch.ones_like(q[:1])
    return ops.attention_product(q, q, q.flip(2), graph, edge_key=table, edge_value=table)


def products(graph, x, q, a, **_):
    by_head = torch.stack([a, a * a, 1 - a], 1)
    parts = [ops.spmm(graph, a, x), ops.spmm(graph, by_head, x), ops.spmm(graph, by_head, q)]
    return torch.cat([part.flatten(1) for part in parts], 1)


def softmaxes(graph, a, **_):
    scores = torch.stack([a, a * a, 1 - a], 1)
    sides = ("receiver", "sender")
    return torch.cat([ops.edge_softmax(scores, graph, normalize=side) for side in sides], 1)


CALLS = [
    attention, given_weights, weights, mean_weights, sums_of_values, products, softmaxes,
]  # fmt: skip
OPERATORS = pytest.mark.parametrize("call", CALLS)


def results(call, graph, d=37, heads=3, d_k=5, dtype=torch.float32):
    """The output and every gradient, by name."""
    g = torch.Generator().manual_seed(1)
    n = graph.num_nodes
    shapes = {
        "x": (n, d), "q": (n, heads, d_k), "k": (n, heads, d_k), "alpha": (d,), "beta": (d,),
        "x0": (n, d), "a": (graph.num_edges,),
    }  # fmt: skip
    inputs = {k: torch.randn(*s, generator=g).to(dtype) for k, s in shapes.items()}
    inputs = {k: t.requires_grad_() for k, t in inputs.items()}
    out = call(graph, **inputs)
    upstream = torch.randn(out.shape, generator=g).to(dtype)
    grads = torch.autograd.grad(out, list(inputs.values()), upstream, allow_unused=True)
    named = dict(zip(inputs, grads, strict=True))
    return {"out": out} | {f"d{name}": grad for name, grad in named.items() if grad is not None}


@OPERATORS
def test_cut_rows_agree_with_the_reference(call):
    graph = awkward()
    assert graph.csr(rows.plan).work.hub_rows.numel() == 2
    assert graph.csr(rows.plan, transposed=True).work.hub_rows.numel() == 2
    with backend("reference"):
        want = results(call, graph, dtype=torch.float64)
    for name, got in results(call, graph).items():
        assert_close(name, got, want[name])


def test_projected_backward_twice_with_cut_rows():
    """dk is written over k; neither autograd nor a second backward may notice."""
    graph = awkward()
    x, weight, bias = leaves = [
        torch.randn(*size).requires_grad_() for size in ((graph.num_nodes, 8), (12, 8), (12,))
    ]
    f = ops.projected_attention_diffusion(x, weight, bias, graph, heads=2)
    first = torch.autograd.grad(f, leaves, torch.ones_like(f), retain_graph=True)
    second = torch.autograd.grad(f, leaves, torch.ones_like(f))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_hub_of_very_many_neighbours_is_not_searched(monkeypatch):
    def search(*views):
        raise AssertionError("would take seconds")

    monkeypatch.setattr(row_order, "reverse_cuthill_mckee", search)
    monkeypatch.setattr(row_order, "_LARGEST_HUBS", (N - 1) ** 2 - 1)
    others = torch.arange(1, N)
    graph = Graph.from_edge_index(torch.stack([others, torch.zeros_like(others)]), N)
    assert row_order.visiting_order(graph.csr(), graph.csr(transposed=True)) is None


@OPERATORS
def test_an_order_changes_no_bit(call):
    graph = awkward()
    want = results(call, visited(graph, None))
    for order in (torch.randperm(graph.num_nodes), torch.arange(graph.num_nodes).flip(0)):
        for name, got in results(call, visited(graph, order)).items():
            if name == "dalpha":  # a sum over all rows, in the order in which they are visited
                assert_close(name, got, want[name])
            else:
                assert torch.equal(got, want[name]), name


@OPERATORS
def test_threads_change_no_bit(call):
    graph = awkward()
    graph = visited(graph, torch.randperm(graph.num_nodes))
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(results(call, graph))
    finally:
        torch.set_num_threads(before)
    for name, got in runs[0].items():
        assert torch.equal(got, runs[1][name]), name


@pytest.mark.parametrize("transposed", [False, True], ids=["A", "At"])
def test_a_planned_view_holds_the_rows_in_visiting_order(transposed):
    graph = awkward()
    order = torch.randperm(graph.num_nodes)
    plain = graph.csr(transposed=transposed)
    view = visited(graph, order).csr(rows.plan, transposed=transposed)
    degree = plain.rowptr.diff()
    assert torch.equal(view.rowptr.diff(), degree[order])
    assert torch.equal(view.work.order, order)
    slots = torch.arange(graph.num_edges) + view.work.shift.repeat_interleave(degree[order])
    want = torch.cat([torch.arange(plain.rowptr[i], plain.rowptr[i + 1]) for i in order])
    assert torch.equal(slots, want)
    assert torch.equal(view.col, plain.col[want])
    assert transposed == (view.slot is not None)
    assert not transposed or torch.equal(view.slot, plain.slot[want])
    assert sorted(view.work.hub_rows.tolist()) == ([30, 31] if transposed else [20, 21])


def test_by_number_nothing_is_copied():
    graph = visited(awkward(), None)
    for transposed in (False, True):
        view, plain = graph.csr(rows.plan, transposed=transposed), graph.csr(transposed=transposed)
        assert view.rowptr.data_ptr() == plain.rowptr.data_ptr()
        assert view.col.data_ptr() == plain.col.data_ptr()
        assert not transposed or view.slot.data_ptr() == plain.slot.data_ptr()


def test_the_order_is_sought_once_and_for_the_cpu_alone(monkeypatch):
    calls = []
    monkeypatch.setattr("grand_fast.graph.graph.visiting_order", lambda *views: calls.append(views))
    graph = awkward()
    graph.csr()
    graph.csr(transposed=True)
    assert not calls
    graph.csr(rows.plan)
    graph.csr(rows.plan, transposed=True)
    assert len(calls) == 1


def near(n: int = N, *, reach: int = 300, symmetric: bool) -> torch.Tensor:
    """Edges whose ends have near numbers."""
    sender = torch.arange(n).repeat_interleave(5)
    receiver = (sender + torch.randint(-reach, reach, sender.shape)) % n
    edges = torch.stack([sender, receiver])
    return torch.cat([edges, edges.flip(0)], dim=1) if symmetric else edges


def share(graph: Graph, order: torch.Tensor) -> float:
    return row_order._distinct_share(graph.csr(), graph.csr(transposed=True), order)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "directed"])
def test_shuffled_neighbours_are_brought_together(symmetric):
    edges = near(symmetric=symmetric)
    kept = Graph.from_edge_index(edges, N)
    assert kept._visiting_order is None
    shuffled = Graph.from_edge_index(torch.randperm(N)[edges], N)
    order = shuffled._visiting_order
    assert order is not None
    assert torch.equal(order.sort().values, torch.arange(N))
    by_number = torch.arange(N)
    assert share(shuffled, order) < 0.5 * share(shuffled, by_number)
    assert share(shuffled, order) < 1.2 * share(kept, by_number)


def test_random_small_and_huge_graphs_keep_their_order(monkeypatch):
    random = Graph.from_edge_index(torch.randint(0, N, (2, 10 * N)), N)
    assert random._visiting_order is None
    small = Graph.from_edge_index(torch.randperm(N - 1)[near(N - 1, symmetric=True)], N - 1)
    assert small._visiting_order is None
    monkeypatch.setattr(row_order, "_LARGEST", 9 * N)
    huge = Graph.from_edge_index(torch.randperm(N)[near(symmetric=True)], N)
    assert huge._visiting_order is None


def test_the_share_counts_different_senders():
    # every row receives from nodes 0 and 1: two of N·2 edges are different
    n = 100
    edges = torch.stack([torch.tensor([0, 1]).repeat(n), torch.arange(n).repeat_interleave(2)])
    graph = Graph.from_edge_index(edges, n)
    view = graph.csr()
    assert row_order._distinct_share(view, view, torch.arange(n)) == 2 / (2 * n)
