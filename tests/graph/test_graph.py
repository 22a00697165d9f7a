import numpy as np
import pytest
import scipy.sparse
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric import EdgeIndex
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from grand_fast import Graph
from grand_fast.testing import GRAPH_KINDS, assert_close, random_edge_index, random_graph


@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_both_views_describe_the_edges(kind):
    edges, n = random_edge_index(kind)
    graph = Graph.from_edge_index(edges, n)
    assert (graph.num_nodes, graph.num_edges) == (n, edges.shape[1])
    assert graph.rowptr.dtype == graph.col.dtype == graph.perm.dtype == torch.int32
    sender, receiver = edges
    row = torch.repeat_interleave(torch.arange(n), graph.rowptr.diff())
    perm = graph.perm.long()
    assert torch.equal(row, receiver[perm])
    assert torch.equal(graph.col.long(), sender[perm])
    assert torch.equal(torch.sort(perm).values, torch.arange(edges.shape[1]))
    row_t = torch.repeat_interleave(torch.arange(n), graph.rowptr_t.diff())
    perm_t = graph.perm_t.long()
    assert torch.equal(row_t, graph.col.long()[perm_t])
    assert torch.equal(graph.col_t.long(), row[perm_t])
    assert torch.equal(graph.edge_index(), edges)


def test_flow_says_which_row_receives():
    edges, n = random_edge_index("random")
    as_pyg = Graph.from_edge_index(edges, n)
    as_released = Graph.from_edge_index(edges.flip(0), n, flow="target_to_source")
    assert torch.equal(as_pyg.col, as_released.col)
    assert torch.equal(as_pyg.rowptr, as_released.rowptr)
    with pytest.raises(ValueError, match="flow"):
        Graph.from_edge_index(edges, n, flow="sideways")


def test_kinds_of_input_agree():
    edges, n = random_edge_index("random")
    want = Graph.from_edge_index(edges, n)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(Graph.from_edge_index(edges.to(dtype), n).col, want.col)
    assert torch.equal(Graph.from_edge_index(EdgeIndex(edges, sparse_size=(n, n))).col, want.col)
    assert Graph.from_edge_index(EdgeIndex(edges, sparse_size=(99, 99))).num_nodes == 99

    # A matrix is A of y = A x: receivers in its rows
    sender, receiver = (i.numpy() for i in edges.unique(dim=1))
    values = np.arange(1.0, len(sender) + 1)
    matrix = scipy.sparse.coo_array((values, (receiver, sender)), shape=(n, n)).tocsr()
    x = torch.randn(n, 3, dtype=torch.float64)
    for given in (
        matrix,
        scipy.sparse.csr_matrix(matrix),
        torch.sparse_csr_tensor(matrix.indptr, matrix.indices, matrix.data, (n, n)),
    ):
        graph = Graph.from_edge_index(given)
        from grand_fast.ops import csr_diffusion

        ax = csr_diffusion(x, graph.edge_weight.double(), graph, backend="reference") + x
        torch.testing.assert_close(ax, torch.from_numpy(matrix @ x.numpy()))


def test_self_loops_are_appended_where_missing():
    edges = torch.tensor([[0, 1, 1], [1, 1, 2]])
    weight = torch.tensor([3.0, 4.0, 5.0])
    graph = Graph.from_edge_index(edges, 4, weight, self_loops=0.5)
    assert torch.equal(graph.edge_index()[:, :3], edges)
    assert torch.equal(graph.edge_index()[:, 3:], torch.tensor([[0, 2, 3], [0, 2, 3]]))
    assert torch.equal(graph.edge_weight, torch.tensor([3.0, 4.0, 5.0, 0.5, 0.5, 0.5]))
    assert Graph.from_edge_index(edges, 4, self_loops=1.0).edge_weight is None
    assert torch.equal(
        Graph.from_edge_index(edges, 4, self_loops=2.0).edge_weight,
        torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]),
    )


def test_nodes_without_edges_and_empty_graphs():
    assert Graph.from_edge_index(torch.empty(2, 0, dtype=torch.long)).num_nodes == 0
    graph = Graph.from_edge_index(torch.tensor([[0], [1]]), 5)
    assert graph.num_nodes == 5 and graph.rowptr.tolist() == [0, 0, 1, 1, 1, 1]


def test_symmetry_is_of_edges_and_weights():
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    assert Graph.from_edge_index(edges).is_symmetric()
    assert not Graph.from_edge_index(edges[:, :3]).is_symmetric()
    assert Graph.from_edge_index(edges, None, torch.tensor([1.0, 1.0, 2.0, 2.0])).is_symmetric()
    assert not Graph.from_edge_index(edges, None, torch.arange(4.0)).is_symmetric()


@pytest.mark.parametrize("method", ["rcm", "degree"])
@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_reorder_renumbers_the_nodes(kind, method):
    graph = random_graph(kind)
    moved, order = graph.reorder(method)
    assert torch.equal(torch.sort(order).values, torch.arange(graph.num_nodes))
    assert torch.equal(order[moved.edge_index()], graph.edge_index())


def test_reorder_brings_neighbours_together():
    n = 400
    path = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
    shuffled = torch.randperm(n)[torch.cat([path, path.flip(0)], dim=1)]
    moved, _ = Graph.from_edge_index(shuffled, n).reorder("rcm")
    sender, receiver = moved.edge_index()
    assert (sender - receiver).abs().max() == 1
    with pytest.raises(ValueError, match="rcm"):
        moved.reorder("hilbert")


def test_random_walk_weights_sum_to_one():
    graph = Graph.from_edge_index(
        torch.tensor([[0, 1, 2], [1, 2, 2]]), 3, torch.tensor([2.0, 1.0, 3.0])
    )
    assert graph.random_walk_weights().tolist() == [1.0, 0.25, 0.75]


def test_symmetric_weights_are_those_of_gcn_norm():
    """Also in csr order, and 0 where a degree is 0."""
    edges, n = random_edge_index("empty_rows")
    weight = torch.rand(edges.shape[1], dtype=torch.float64)
    weight[edges[1] == edges[1, 0]] = 0
    for given in (weight, None):
        graph = Graph.from_edge_index(edges, n, given)
        _, want = gcn_norm(edges, given, n, add_self_loops=False, dtype=torch.float64)
        assert_close("weights", graph.symmetric_weights(torch.float64), want)
        slots = graph.symmetric_weights(torch.float64, edge_order="csr")
        assert_close("slots", slots, want[graph.perm.long()])
        assert bool((want == 0).any())  # of senders that receive nothing


def test_to_the_same_device_is_the_same_graph():
    graph = random_graph("random")
    assert graph.to("cpu") is graph
    assert graph.to("meta").device.type == "meta"


class Written(TorchDispatchMode):
    """Counts the sorts, and the elements that operations return."""

    def __init__(self):
        super().__init__()
        self.sorts = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sorts += "sort" in func.__name__
        returned = result if isinstance(result, tuple | list) else [result]
        self.elements += sum(t.numel() for t in returned if isinstance(t, torch.Tensor))
        return result


@pytest.mark.parametrize("loops", [None, 1.0])
def test_a_build_is_two_sorts_and_little_more(loops):
    """Its time is that of a few sorts of the edges, whatever their number."""
    shares = []
    for n in (500, 5_000):
        edges = torch.randint(n, (2, 10 * n))
        with Written() as written:
            Graph.from_edge_index(edges, n, self_loops=loops)
        assert written.sorts == 2
        shares.append(written.elements / edges[0].numel())
    assert shares[1] == pytest.approx(shares[0], rel=0.01) and max(shares) < 30
