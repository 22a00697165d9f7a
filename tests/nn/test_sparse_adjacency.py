"""A sparse matrix as the edges: its values are the edge weights, with their gradient."""

import gc
import weakref

import pytest
import scipy.sparse
import torch

import grand_fast as gf
from grand_fast.graph.cached import _graphs
from grand_fast.nn import GRAND, GRANDConv
from grand_fast.testing import assert_close, random_edge_index

N, D = 40, 4
DISTINCT = "^Graph: `edge_index` as a matrix that requires a gradient must have distinct entries"


def edges_and_weights():
    edges = random_edge_index("random")[0].unique(dim=1)
    edges = edges[:, torch.randperm(edges.shape[1])]
    weight = 0.5 + torch.rand(edges.shape[1], dtype=torch.float64)
    return edges, weight.requires_grad_()


class PairList:
    """What is asked of torch_sparse's SparseTensor."""

    def __init__(self, row, col, value):
        self._coo = row, col, value

    def coo(self):
        return self._coo

    def sparse_sizes(self):
        return N, N


def csr_by_hand(edges, weight, *, rising=True):
    """Whose columns rise within each row, or fall."""
    order = torch.argsort(edges[1] * N + (edges[0] if rising else -edges[0]), stable=True)
    rowptr = torch.zeros(N + 1, dtype=torch.long)
    rowptr[1:] = torch.bincount(edges[1], minlength=N).cumsum(0)
    return torch.sparse_csr_tensor(rowptr, edges[0][order], weight[order], (N, N))


def coo(edges, weight):
    return torch.sparse_coo_tensor(edges.flip(0), weight, (N, N))


# Rows receive, so the row of an edge is its target
MATRICES = {
    "coo": coo,
    "coalesced": lambda edges, weight: coo(edges, weight).coalesce(),
    "transposed coo": lambda edges, weight: torch.sparse_coo_tensor(edges, weight, (N, N)).t(),
    "transposed coalesced": lambda edges, weight: coo(edges.flip(0), weight).coalesce().t(),
    "scaled coo": lambda edges, weight: 2.0 * coo(edges, 0.5 * weight),
    "csr": lambda edges, weight: coo(edges, weight).to_sparse_csr(),
    "csr by hand": csr_by_hand,
    "csc": lambda edges, weight: coo(edges, weight).to_sparse_csc(),
    "transposed csr": lambda edges, weight: coo(edges.flip(0), weight).to_sparse_csr().t(),
    "transposed csc": lambda edges, weight: coo(edges.flip(0), weight).to_sparse_csc().mT,
    "SparseTensor": lambda edges, weight: PairList(edges[1], edges[0], weight),
}
EACH = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
MODELS = {
    "conv": lambda: GRANDConv(D, heads=2, T=2.0),
    "conv l": lambda: GRANDConv(D, heads=2, variant="l", method="dopri5"),
    "conv continuous": lambda: GRANDConv(D, T=2.0, adjoint="continuous"),
    "grand": lambda: GRAND(D, 6, 3, heads=2, reweight=True, method="dopri5", T=2.0),
    "laplacian": lambda: GRAND(D, 6, 3, variant="laplacian", laplacian="symmetric"),
    "mixed": lambda: GRAND(D, 6, 3, variant="mixed", source=True),
}


@pytest.mark.parametrize(
    "name, kind",
    [("conv", kind) for kind in MATRICES]
    + [(name, kind) for name in MODELS for kind in ("transposed coo", "csr") if name != "conv"],
)
def test_gradient_by_the_values(name, kind):
    edges, weight = edges_and_weights()
    matrix = MATRICES[kind]
    model, x = MODELS[name]().double(), torch.randn(N, D, dtype=torch.float64)
    graph = gf.Graph.from_edge_index(edges, N, weight)
    found = []
    for given in (graph, matrix(edges, weight)):
        y = model(x, given)
        found.append([y, *torch.autograd.grad(y.square().sum(), [weight, *model.parameters()])])
    assert float(found[0][1].abs().max()) > 1e-3
    want, got = found
    assert_close("output", got[0], want[0])
    assert_close("gradient by the weights", got[1], want[1], tolerance=1e-11)
    got, want = (torch.cat([g.flatten() for g in grads[2:]]) for grads in (got, want))
    assert_close("other gradients", got, want, tolerance=1e-11)


@pytest.mark.parametrize("self_loops", [None, 2.0])
@EACH
def test_gradient_by_the_values_of_a_graphs_matrix(matrix, self_loops):
    edges, weight = edges_and_weights()
    layer = gf.nn.AttentionDiffusion(D, heads=2, reweight=True).double()
    x = torch.randn(N, D, dtype=torch.float64)
    found = []
    for given, more in ((edges, weight), (matrix(edges, weight), None)):
        graph = gf.Graph.from_edge_index(given, N, more, self_loops=self_loops)
        f = layer(x, graph) + gf.ops.csr_diffusion(x, graph.edge_weight, graph)
        a = gf.ops.edge_attention(*layer.query_key(x), graph, edge_weight=graph.edge_weight)
        found.append(torch.autograd.grad(f.square().sum() + a.square().sum(), weight)[0])
    assert_close("gradient", found[1], found[0], tolerance=1e-11)


def test_a_matrix_that_is_a_parameter():
    """Its gradient is sparse, as of torch's own products."""
    edges, weight = edges_and_weights()
    conv, x = GRANDConv(D).double(), torch.randn(N, D, dtype=torch.float64)
    (want,) = torch.autograd.grad(conv(x, edges, weight).square().sum(), weight)
    for change in (lambda m: m, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc):
        matrix = change(coo(edges, weight.detach())).requires_grad_()
        (grad,) = torch.autograd.grad(conv(x, matrix).square().sum(), matrix)
        assert grad.layout is matrix.layout
        dense = grad.to_dense()
        assert_close("gradient", dense[edges[1], edges[0]], want, tolerance=1e-11)


@pytest.mark.parametrize("kind", ["coo", "csr", "csc"])
def test_two_steps_of_training_with_a_matrix_that_is_made_once_and_changed(kind):
    """No weights of the first step are kept, nor what they were computed from."""
    edges, weight = edges_and_weights()
    conv, x = GRANDConv(D).double(), torch.randn(N, D, dtype=torch.float64)
    matrix = MATRICES[kind](edges, weight.detach()).requires_grad_()
    own = matrix.detach()  # the same memory, and another version counter
    values = own._values() if kind == "coo" else own.values()
    place = torch.arange(edges.shape[1], dtype=torch.float64)
    place = MATRICES[kind](edges, place)
    place = (place._values() if kind == "coo" else place.values()).long()
    expected = weight.detach().clone()
    for _ in range(3):
        expected.requires_grad_()
        want = conv(x, edges, expected)
        (grad,) = torch.autograd.grad(want.square().sum(), expected)
        got = conv(x, matrix)
        assert_close("output", got, want)
        (of_matrix,) = torch.autograd.grad(got.square().sum(), matrix)
        of_values = of_matrix._values() if kind == "coo" else of_matrix.values()
        assert_close("gradient", of_values, grad[place], tolerance=1e-11)
        expected = expected.detach() - 0.1 * grad
        values.copy_(expected[place])


def test_nothing_is_kept_of_a_matrix():
    edges, weight = edges_and_weights()
    conv, x = GRANDConv(D).double(), torch.randn(N, D, dtype=torch.float64)
    gc.collect()
    before = len(_graphs)
    for change in (lambda m: m, torch.Tensor.to_sparse_csr):
        made = 2 * weight
        matrix = change(coo(edges, made))
        conv(x, matrix).sum().backward()
        assert len(_graphs) == before + 1
        alive = [weakref.ref(made), weakref.ref(matrix)]
        del made, matrix
        gc.collect()
        assert [ref() for ref in alive] == [None, None] and len(_graphs) == before


def test_the_edges_of_a_matrix_are_sorted_once(monkeypatch):
    made, real = [], gf.Graph._sorted.__func__
    monkeypatch.setattr(
        gf.Graph, "_sorted", classmethod(lambda cls, *given: made.append(1) or real(cls, *given))
    )
    edges, weight = edges_and_weights()
    matrix, conv = coo(edges, weight), GRANDConv(D).double()
    for _ in range(3):
        conv(torch.randn(N, D, dtype=torch.float64), matrix)
    assert len(made) == 1


def test_matrices_without_a_gradient():
    edges, weight = edges_and_weights()
    conv, x = GRANDConv(D).double(), torch.randn(N, D, dtype=torch.float64)
    want = conv(x, edges, weight.detach())
    entries = (weight.detach().numpy(), edges.flip(0).numpy())
    for given in (
        scipy.sparse.coo_array(entries, shape=(N, N)),
        scipy.sparse.csc_array(scipy.sparse.coo_array(entries, shape=(N, N))),
        coo(edges, weight).detach(),
    ):
        assert_close("output", conv(x, given), want)
    whole = coo(edges, torch.full_like(weight, 3.0).long())
    assert_close("integers", conv(x, whole), conv(x, edges, torch.full_like(weight, 3.0)))
    with torch.inference_mode():
        assert_close("output", conv(x, coo(edges, weight.detach())), want)


def test_repeated_entries():
    """Each an edge of its own, whose gradient torch's sparse matrices cannot tell apart."""
    edges = torch.tensor([[0, 1, 1, 2], [2, 2, 2, 0]])
    weight = torch.tensor([0.7, 1.3, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    conv, x = GRANDConv(D).double(), torch.randn(N, D, dtype=torch.float64)
    want = conv(x, edges, weight)
    for matrix in (coo(edges, weight), csr_by_hand(edges, weight)):
        assert_close("output", conv(x, matrix.detach()), want)
        with pytest.raises(NotImplementedError, match=DISTINCT):
            conv(x, matrix)
    summed = conv(x, coo(edges, weight).coalesce())
    (got,) = torch.autograd.grad(summed.square().sum(), weight)
    assert got[1] == got[2] != 0


def test_a_compressed_matrix_in_another_order():
    """Of which torch gives each value the gradient of another."""
    edges, weight = edges_and_weights()
    conv, x = GRANDConv(D).double(), torch.randn(N, D, dtype=torch.float64)
    matrix = csr_by_hand(edges, weight, rising=False)
    assert_close("output", conv(x, matrix.detach()), conv(x, edges, weight))
    for given in (matrix, matrix.t()):
        with pytest.raises(NotImplementedError, match=DISTINCT):
            conv(x, given)
