"""What is taken for a graph: every layout of a matrix; and what is refused, in which words."""

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from torch_geometric import EdgeIndex

from grand_fast import Graph
from grand_fast.graph import checks


def dense_of(graph):
    sender, receiver = graph.edge_index()
    matrix = torch.zeros(graph.num_nodes, graph.num_nodes)
    return matrix.index_put((receiver, sender), graph.edge_weight.float(), accumulate=True)


class StandIn:
    """What `SparseTensor` of torch_sparse, which is seldom installed, answers."""

    def __init__(self, matrix):
        self.matrix = matrix

    def coo(self):
        return *self.matrix._indices(), self.matrix._values()

    def sparse_sizes(self):
        return tuple(self.matrix.shape)


LAYOUTS = {
    "coo": lambda m: m.to_sparse(),
    "csr": lambda m: m.to_sparse_csr(),
    "csc": lambda m: m.to_sparse_csc(),
    "bsr": lambda m: m.to_sparse_bsr((2, 3)),
    "bsc": lambda m: m.to_sparse_bsc((3, 3)),
    "SparseTensor": lambda m: StandIn(m.to_sparse()),
    "scipy bsr": lambda m: scipy.sparse.bsr_array(m.numpy(), blocksize=(2, 3)),
    **{f"scipy {name}": lambda m, name=name: scipy.sparse.csr_array(m.numpy()).asformat(name)
       for name in ("coo", "csc", "csr", "dia", "dok", "lil")},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_matrix_has_its_edges_and_no_filling(layout):
    matrix = torch.zeros(6, 6)
    matrix[[0, 1, 1, 4, 5], [1, 0, 3, 2, 5]] = torch.tensor([1.0, 2.0, 3.0, 4.0, -5.0])
    graph = Graph.from_edge_index(LAYOUTS[layout](matrix))
    assert (graph.num_nodes, graph.num_edges) == (6, 5)
    assert graph.edge_weight.dtype == torch.float32
    assert torch.equal(dense_of(graph), matrix)
    with pytest.raises(ValueError, match=r"must be square, got \[6, 3\].*bipartite"):
        Graph.from_edge_index(LAYOUTS[layout](matrix[:, :3].contiguous()))


def test_zeros_that_were_given_one_by_one_are_edges():
    ends, values = ([0, 1, 2], [1, 0, 2]), [0.0, 1.0, 0.0]
    for given in (
        scipy.sparse.csr_array((values, ends), shape=(3, 3)),
        torch.sparse_coo_tensor(ends, values, (3, 3)),
        torch.sparse_coo_tensor(ends, values, (3, 3)).to_sparse_csr(),
    ):
        assert Graph.from_edge_index(given).edge_weight.tolist() == values


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("layout", ["coo", "SparseTensor", "scipy csr", "scipy bsr"])
def test_counts_and_truths_in_a_matrix_are_weights_in_the_default_dtype(layout, dtype):
    matrix = torch.zeros(6, 6)
    matrix[[0, 1, 3], [1, 0, 2]] = torch.tensor([1.0, 3.0, 0.0])
    want = matrix.to(dtype).float()
    graph = Graph.from_edge_index(LAYOUTS[layout](matrix.to(dtype)))
    assert graph.edge_weight.dtype == torch.float32 and torch.equal(dense_of(graph), want)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_complex_matrices_are_refused(layout, dtype):
    matrix = torch.eye(6, dtype=dtype)
    with pytest.raises(TypeError, match="^Graph: `edge_index` as a matrix must hold real.*complex"):
        Graph.from_edge_index(LAYOUTS[layout](matrix))
    with pytest.raises(
        TypeError, match="^Graph: `edge_index` as a matrix must hold real.*float128"
    ):
        Graph.from_edge_index(scipy.sparse.eye_array(3).tocsr().astype(np.longdouble))


def test_the_size_of_an_edge_index_of_pyg():
    edges = torch.tensor([[0, 1, 2], [1, 0, 1]])
    for size, n in (((5, 5), 5), ((5, None), 5), ((None, 4), 4), ((None, None), 3)):
        assert Graph.from_edge_index(EdgeIndex(edges, sparse_size=size)).num_nodes == n
    for size in ((3, 2), (3, 4), (9, 5)):
        with pytest.raises(ValueError, match=r"must be square, got \[\d, \d\].*bipartite"):
            Graph.from_edge_index(EdgeIndex(edges, sparse_size=size))
    with pytest.raises(ValueError, match=r"must be square, got \[9, 5\]"):
        Graph.from_edge_index(EdgeIndex(edges, sparse_size=(9, 5)), 9)
    given = EdgeIndex(edges)
    assert given.get_sparse_size() == (3, 2)  # which it counted, and keeps
    for n in (3, 5):
        assert Graph.from_edge_index(given, n).num_nodes == n


def test_nodes_that_no_memory_holds_are_refused(monkeypatch):
    edges = torch.tensor([[0, 99], [1, 2]])
    free = 28 * 100
    monkeypatch.setattr(checks, "_ALWAYS_FITS", 0)
    monkeypatch.setattr(checks, "free_memory", lambda: free)
    assert Graph.from_edge_index(edges).num_nodes == 100
    free -= 1
    text = r"fit in memory, got id 99, so N = 100, which takes 0.0 GB where 0.0 are free. Number"
    with pytest.raises(ValueError, match=text):
        Graph.from_edge_index(edges)
    for n in (100, np.int64(100)):
        with pytest.raises(ValueError, match="^Graph: `num_nodes` must .* got 100, so N = 100"):
            Graph.from_edge_index(edges, n)
    with pytest.raises(ValueError, match="got a matrix of 100 rows, so N = 100"):
        Graph.from_edge_index(torch.sparse_coo_tensor(edges, torch.ones(2), (100, 100)))


EDGES = torch.tensor([[0, 1, 2], [1, 2, 0]])
BAD = {
    "transposed": (ValueError, r"\[2, E\].*\[3, 2\].*edge_index\.t\(\)", (EDGES.t(),)),
    "one row": (ValueError, r"\[2, E\]", (EDGES[0],)),
    "floating": (TypeError, r"integer.*float32.*\.long\(\)", (EDGES.float(),)),
    "boolean": (TypeError, "integer.*bool", (EDGES.bool(),)),
    "list": (TypeError, "edge_index.*list", ([[0, 1], [1, 0]],)),
    "negative": (ValueError, "at least 0, got id -1", (EDGES - 1,)),
    "too large": (ValueError, "num_nodes=2, got id 2.*num_nodes=3", (EDGES, 2)),
    "batch": (ValueError, r"\[2, E\], got \[4, 2, 3\]. Join the graphs", (EDGES.expand(4, 2, 3),)),
    "no dimension": (ValueError, r"\[2, E\], got \[\]", (EDGES.sum(),)),
    "terabytes": (ValueError, "at most 2147483647 nodes, got id 1099511627776. Number",
                  (EDGES << 39,)),
    "too large for all": (ValueError, "below num_nodes=3, got id 1099511627776. Number",
                          (EDGES << 39, 3)),
    "num_nodes ≥ 2³¹": (ValueError, "num_nodes` must lie in", (EDGES, 1 << 31)),
    "num_nodes": (TypeError, "num_nodes.*float", (EDGES, 3.0)),
    "num_nodes < 0": (ValueError, "num_nodes", (EDGES, -3)),
    "weight length": (ValueError, r"\[E\] = \[3\], got \[2\]", (EDGES, 3, torch.ones(2))),
    "weight shape": (ValueError, "flatten", (EDGES, 3, torch.ones(3, 1))),
    "weight dtype": (TypeError, "edge_weight.*int64", (EDGES, 3, torch.ones(3).long())),
    "weight bool": (TypeError, r"edge_weight.*bool. Try .float\(\)", (EDGES, 3, EDGES[0] > 0)),
    "weight complex": (TypeError, "edge_weight.*complex64.$", (EDGES, 3, EDGES[0] * 1j)),
    "weight inf": (ValueError, "finite, got -inf at edge 2",
                   (EDGES, 3, torch.tensor([1.0, 1.0, -float("inf")]))),
    "weight nan": (ValueError, "finite, got nan at edge 1",
                   (EDGES, 3, torch.tensor([1.0, float("nan"), 1.0]))),
    "weight device": (ValueError, "device", (EDGES, 3, torch.ones(3, device="meta"))),
    "not square": (ValueError, "square", (scipy.sparse.csr_array((2, 3)),)),
    "not square, N given": (ValueError, "square", (torch.ones(2, 3).to_sparse(), 3)),
    "no matrix": (ValueError, r"square, got \[3\].$", (scipy.sparse.coo_array(np.ones(3)),)),
    "many matrices": (ValueError, r"square, got \[2, 3, 3\].$", (torch.ones(2, 3, 3).to_sparse(),)),
    "half dense": (ValueError, "sparse in rows and columns", (torch.ones(3, 3).to_sparse(1),)),
    "matrix nan": (ValueError, "finite, got nan at edge 0",
                   (torch.full((3, 3), math.nan).to_sparse_csr(),)),
    "blocks with gradient": (NotImplementedError, "in blocks must not require a gradient",
                             (torch.eye(4).to_sparse_bsr((2, 2)).requires_grad_(),)),
    "nested": (TypeError, "dense or sparse, got torch.jagged",
               (torch.nested.nested_tensor([EDGES[0]], layout=torch.jagged),)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, text, arguments = BAD[case]
    with pytest.raises(error, match=text) as caught:
        Graph.from_edge_index(*arguments)
    assert str(caught.value).startswith("Graph: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("loops", [True, "1", float("nan"), float("inf")])
def test_bad_self_loops(loops):
    with pytest.raises((TypeError, ValueError), match="self_loops"):
        Graph.from_edge_index(EDGES, self_loops=loops)


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr,
                                  lambda m: scipy.sparse.csr_array(m.numpy())])  # fmt: skip
@pytest.mark.parametrize("size", [3, 5])
def test_a_matrix_of_another_size_is_refused(size, make):
    with pytest.raises(ValueError, match=f"as a matrix must have num_nodes=4 rows, got {size}"):
        Graph.from_edge_index(make(torch.eye(size)), 4)
