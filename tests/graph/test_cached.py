"""The graph that is kept with a tensor of edges, and what tells that they have changed."""

import itertools
import weakref

import numpy as np
import pytest
import torch
from torch_geometric import EdgeIndex

from grand_fast import Graph, graph_of, nn
from grand_fast.graph import cached, cached_graph
from grand_fast.graph.cached import fingerprint
from grand_fast.nn.encoder import sparse_linear
from grand_fast.testing import assert_close, random_edge_index


def dense_of(graph):
    sender, receiver = graph.edge_index()
    matrix = torch.zeros(graph.num_nodes, graph.num_nodes)
    return matrix.index_put((receiver, sender), graph.edge_weight.float(), accumulate=True)


def changed(edges, how):
    """Other edges, on the same nodes and as many of them unless that is the change."""
    edges = edges.clone()
    if how == "a sender":
        edges[0, 7] = (edges[0, 7] + 1) % 40
    elif how == "a receiver":
        edges[1, -1] = (edges[1, -1] + 1) % 40
    elif how == "two edges' places":
        edges[:, [0, 5]] = edges[:, [5, 0]]
    elif how == "two senders' places":
        edges[0, [0, 5]] = edges[0, [5, 0]]
    elif how == "direction":
        edges = edges.flip(0)
    elif how == "sorted":
        edges = edges[:, edges[1].argsort(stable=True)]
    return edges


def through_numpy(edges, new):
    edges.numpy()[...] = new.numpy()


def through_data(edges, new):
    edges.data[...] = new


def in_place(edges, new):
    edges.copy_(new)


@pytest.mark.parametrize("write", [in_place, through_data, through_numpy])
@pytest.mark.parametrize("how", ["a sender", "a receiver", "two edges' places",
                                 "two senders' places", "direction", "sorted"])  # fmt: skip
def test_a_kept_graph_follows_the_edges(write, how):
    edges, n = random_edge_index("random")
    old, new = edges.clone(), changed(edges, how)
    assert not torch.equal(old, new)
    first = cached_graph(edges, n)
    write(edges, new)
    now = cached_graph(edges, n)
    assert_same(now, Graph.from_edge_index(new, n))
    assert torch.equal(first.edge_index(), old) and cached_graph(edges, n) is now
    write(edges, old)
    assert_same(cached_graph(edges, n), first)


def assert_same(got, want):
    assert torch.equal(got.edge_index(), want.edge_index())
    for name in ("rowptr", "col", "rowptr_t", "col_t", "perm", "perm_t"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


VIEWS = {
    "columns": lambda edges: edges[:, 3:],
    "rows": lambda edges: edges[0:2],
    "detached": lambda edges: edges.detach(),
    "transposed": lambda edges: edges.t().t(),
    "of a view": lambda edges: edges[:, 1:][:, 2:],
}


@pytest.mark.parametrize("write", [in_place, through_data, through_numpy])
@pytest.mark.parametrize("view", VIEWS)
def test_views_made_anew_have_the_graph_of_their_memory(view, write):
    edges, n = random_edge_index("random")
    first = graph_of(VIEWS[view](edges), n)
    assert graph_of(VIEWS[view](edges), n) is first
    assert_same(first, Graph.from_edge_index(VIEWS[view](edges).clone(), n))
    assert graph_of(edges[:, 4:], n) is not first and graph_of(edges[:, 4:-1], n) is not first
    write(edges, edges.flip(1))
    assert_same(graph_of(VIEWS[view](edges), n), Graph.from_edge_index(VIEWS[view](edges), n))


def test_views_and_graphs_of_one_tensor_are_few():
    edges, n = random_edge_index("random")
    refs = [weakref.ref(graph_of(edges[:, i:], n)) for i in range(9)]
    assert [ref() is not None for ref in refs] == [False] * 5 + [True] * 4
    held = [graph_of(edges[:, 8:], n + i) for i in range(9)]
    assert graph_of(edges[:, 8:], n + 8) is held[8] and graph_of(edges[:, 8:], n) is not held[0]


def test_too_many_that_threads_have_left_go():
    """Each finds room for one more, then all enter theirs."""
    table = dict.fromkeys(range(12))
    cached._keep(table, "last", None)
    assert list(table) == [9, 10, 11, "last"]


def test_views_that_begin_alike_are_kept_apart():
    edges = torch.tensor([[0, 1], [2, 0]])
    first, other = graph_of(edges, 3), graph_of(edges.t(), 3)
    assert graph_of(edges, 3) is first and graph_of(edges.t(), 3) is other is not first


def test_a_view_alone_keeps_what_it_is_a_view_of():
    view = random_edge_index("random")[0][:, 1:]
    graph = graph_of(view, 40)
    assert graph_of(view[:], 40) is graph_of(view[:], 40)
    kept = weakref.ref(graph)
    del view, graph
    assert kept() is None


def test_both_directions_are_kept():
    edges, n = random_edge_index("random")
    there, back = graph_of(edges, n), graph_of(edges, n, flow="target_to_source")
    assert_same(back, Graph.from_edge_index(edges, n, flow="target_to_source"))
    assert torch.equal(back.edge_index(), there.edge_index().flip(0))
    assert graph_of(edges, n) is there and graph_of(edges, n, flow="target_to_source") is back
    assert graph_of(there, n) is there
    with pytest.raises(ValueError, match="Graph: `flow` must be one of .*, got 'both'"):
        graph_of(edges, n, flow="both")
    with pytest.raises(ValueError, match="Graph: `edge_index` must hold ids below num_nodes=3"):
        graph_of(edges, 3)
    with pytest.raises(TypeError, match="Graph: `edge_index` must be an integer tensor"):
        graph_of([[0], [1]], 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_kept_graph_follows_an_edge_index_of_pyg(dtype):
    edges, n = random_edge_index("random")
    given = EdgeIndex(edges.to(dtype), sparse_size=(n, n))
    first = cached_graph(given, n)
    assert cached_graph(given, n) is first
    given._data[0, 0] = (given._data[0, 0] + 1) % n
    assert_same(cached_graph(given, n), Graph.from_edge_index(given.as_tensor().clone(), n))
    assert not torch.equal(cached_graph(given, n).edge_index(), first.edge_index())


def test_a_kept_graph_follows_the_number_of_edges():
    edges = torch.zeros(2, 3, dtype=torch.int64)  # ids that add nothing to a sum
    assert cached_graph(edges, 2).num_edges == 3
    edges.data = torch.zeros(2, 4, dtype=torch.int64)
    assert cached_graph(edges, 2).num_edges == 4
    edges.resize_(2, 2)
    assert cached_graph(edges, 2).num_edges == 2


def test_a_kept_graph_follows_edges_in_any_layout():
    edges, n = random_edge_index("random")
    pairs = edges.t().contiguous()
    given = pairs.t()
    first = cached_graph(given, n)
    assert_same(first, Graph.from_edge_index(edges, n))
    pairs.numpy()[[3, 5]] = pairs.numpy()[[5, 3]]
    assert_same(cached_graph(given, n), Graph.from_edge_index(pairs.t().contiguous(), n))


def test_graphs_are_kept_for_some_numbers_of_nodes(monkeypatch):
    edges, n = random_edge_index("random")
    graphs = [cached_graph(edges, n + more) for more in range(4)]
    with monkeypatch.context() as patched:
        patched.setattr(Graph, "_sorted", None)  # none is built
        for _ in range(2):
            for more in range(4):
                assert cached_graph(edges, n + more) is graphs[more]
    assert cached_graph(edges, n) is graphs[0]
    cached_graph(edges, n + 9)  # in place of the one that was used longest ago
    assert cached_graph(edges, n) is graphs[0] and cached_graph(edges, n + 1) is not graphs[1]
    edges.numpy()[0, 0] += 1
    assert all(cached_graph(edges, n + more) is not graphs[more] for more in range(4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_graphs_are_kept_without_gradients(mode):
    with mode():
        edges, n = random_edge_index("random")
        first = cached_graph(edges, n)
        assert cached_graph(edges, n) is first
        edges[0, 0] = (edges[0, 0] + 1) % n
        assert_same(cached_graph(edges, n), Graph.from_edge_index(edges.clone(), n))


def test_a_kept_graph_goes_with_its_tensor():
    edges, n = random_edge_index("random")
    graph = weakref.ref(cached_graph(edges, n))
    del edges
    assert graph() is None


@pytest.fixture
def capture(monkeypatch):
    """From then on torch believes that the tensors are on a GPU, where a CUDA graph is captured,
    which nothing can be read in."""

    def begin():
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(cached, "fingerprint", None)
        monkeypatch.setattr(torch, "isfinite", None)

    return begin


def test_under_capture_the_graph_is_the_last_one(capture, monkeypatch):
    edges, n = random_edge_index("random")
    first = cached_graph(edges, n)
    capture()
    edges.data[0, 0] = (edges.data[0, 0] + 1) % n
    assert cached_graph(edges, n) is first
    monkeypatch.undo()
    assert cached_graph(edges, n) is not first


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_under_capture_the_values_are_taken_as_they_are(layout, capture):
    matrix = matrices()[layout]
    want = cached_graph(matrix, 5)
    capture()
    got = cached_graph(matrix, 5)
    assert_same(got, want)
    assert torch.equal(got.edge_weight, want.edge_weight)


def matrices():
    """Of the same entries, in order of rows, or of columns where the layout has that."""
    dense = torch.zeros(5, 5)
    dense[[0, 1, 1, 4], [1, 0, 3, 2]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": torch.block_diag(dense, torch.ones(1, 1)).to_sparse_bsr((2, 3)),
        "bsc": torch.block_diag(dense, torch.ones(1, 1)).to_sparse_bsc((3, 2)),
    }


@pytest.mark.parametrize("layout", matrices())
def test_a_kept_graph_has_the_values_a_matrix_holds_now(layout):
    matrix = matrices()[layout]
    n = matrix.shape[0]
    values = matrix._values() if layout == "coo" else matrix.values()
    for factor in (1.0, -2.0, 0.5):
        values.numpy()[...] *= factor  # seen by no version counter
        graph = cached_graph(matrix, n)
        assert_close("A", dense_of(graph), matrix.to_dense().double())
    values.numpy().flat[0] = np.nan
    with pytest.raises(ValueError, match="`edge_weight` must be finite, got nan at edge 0"):
        cached_graph(matrix, n)


def test_a_kept_graph_follows_the_entries_of_a_matrix(monkeypatch):
    matrix = matrices()["csr"]
    first = cached_graph(matrix, 5)
    with monkeypatch.context() as patched:
        patched.setattr(Graph, "_sorted", None)
        assert cached_graph(matrix, 5).col is first.col
    matrix.col_indices().numpy()[0] = 4
    assert_close("A", dense_of(cached_graph(matrix, 5)), matrix.to_dense().double())
    matrix.crow_indices().numpy()[2] = 2
    assert_close("A", dense_of(cached_graph(matrix, 5)), matrix.to_dense().double())


def test_a_layer_follows_edges_and_weights_that_numpy_changes():
    """Its first result was of other edges: the next is that of a graph built now."""
    edges, n = random_edge_index("random")
    weight, x = torch.rand(edges.shape[1]), torch.randn(n, 4)
    layer = nn.GRANDConv(4)
    before = layer(x, edges, weight)
    edges.numpy()[:, [0, 5]] = edges.numpy()[:, [5, 0]]
    of_edges = layer(x, edges, weight)
    weight.numpy()[...] = weight.numpy()[::-1].copy()
    for got, w in ((of_edges, weight.flip(0)), (layer(x, edges, weight), weight)):
        assert torch.equal(got, layer(x, Graph.from_edge_index(edges.clone(), n, w.clone())))
        assert not torch.equal(got, before)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_the_transpose_of_sparse_features_follows_them_too(index):
    dense = (torch.rand(30, 8) < 0.4) * torch.randn(30, 8)
    kept = dense.to_sparse_csr()
    x = torch.sparse_csr_tensor(
        kept.crow_indices().to(index), kept.col_indices().to(index), kept.values(), dense.shape
    )
    layer = torch.nn.Linear(8, 3)
    for _ in range(3):
        y = sparse_linear(x, layer, dropout=0.0, training=True)
        want = layer(x.to_dense())
        assert_close("y", y, want.double())
        found = [torch.autograd.grad(out.square().sum(), layer.weight)[0] for out in (y, want)]
        assert_close("dW", found[0], found[1].double())
        columns, rows = x.col_indices().numpy(), x.crow_indices().numpy()
        columns[...] = (columns + 1) % 8
        rows[1] += 1


@pytest.mark.parametrize("e", [1, 4095, 4096, 4097, 3 * 4096 + 5])
def test_a_fingerprint_tells_every_place_from_every_other(e):
    ids = torch.arange(2 * e).view(2, e)  # no two are alike
    want = fingerprint(*ids)
    ends = {0, 1, 4095, 4096, 4097, 2 * 4096 + 1, e - 2, e - 1} & set(range(e))
    places = [(row, i) for row in (0, 1) for i in ends]
    for place in places:
        ids[place] += 1
        assert fingerprint(*ids) != want
        ids[place] -= 1
    for a, b in itertools.combinations(places, 2):
        other = ids.clone()
        other[a], other[b] = ids[b], ids[a]
        assert fingerprint(*other) != want
    assert fingerprint(*ids) == fingerprint(*ids.clone()) == want


def test_a_fingerprint_tells_regular_changes():
    """Those for which weights that rise evenly, or one table of them, would cancel out."""
    ids = torch.randint(0, 1000, (2, 3 * 4096))
    want = fingerprint(*ids)
    for i in range(0, 4000, 97):
        other = ids.clone()
        other[0, i : i + 3] += torch.tensor([1, -2, 1])
        assert fingerprint(*other) != want
        rows = ids[0].view(3, 4096).clone()
        rows[0, 1], rows[1, 0] = rows[1, 0] + i, rows[0, 1] - i
        rows[0, :2] += torch.tensor([1, -1])
        rows[1, :2] += torch.tensor([-1, 1])
        assert fingerprint(rows.flatten(), ids[1]) != want
