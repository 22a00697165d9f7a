"""`GRANDConv` against the dense formula, and within PyG."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
import torch_geometric.nn
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data

import grand_fast as gf
from grand_fast.nn import GRANDConv
from grand_fast.testing import assert_close, random_edge_index

from ._dense import dense_attention, dense_field

OPTIONS = {
    "nl": {},
    "l": {"variant": "l"},
    "source": {"source": True, "per_channel": True},
    "cosine": {"score": "cosine", "normalizer": "squareplus", "normalize": "sender"},
    "mix": {"mix_features": True},
    "l-mix": {"variant": "l", "mix_features": True},
    "constant": {"constant_init": True, "alpha": 0.7},
}


def dense(conv, x, graph, weight, steps=2):
    """Two steps of explicit Euler on N×N matrices."""
    field, h = conv.field, x
    a = dense_attention(field, x, graph, weight)
    for _ in range(steps):
        if conv.variant == "nl":
            a = dense_attention(field, h, graph, weight)
        h = h + dense_field(field, a, h, None if field.scale.beta is None else x)
    return h


@pytest.mark.parametrize("weighted", [False, True], ids=["bare", "weighted"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_dense(backend, options, weighted):
    edges, n = random_edge_index("repeated")
    weights = 0.5 + torch.rand(n, n, dtype=torch.float64)
    weight = weights[edges[1], edges[0]] if weighted else None
    conv = GRANDConv(6, heads=2, attention_channels=8, T=2.0, method="euler", **options).double()
    if conv.field.scale.beta is not None:
        torch.nn.init.constant_(conv.field.scale.beta, 0.4)
    x = torch.randn(n, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *conv.parameters()]
    with gf.backend(backend):
        y = conv(x, edges, weight)
        got = torch.autograd.grad(y.square().sum(), leaves)
    graph = gf.Graph.from_edge_index(edges, n)
    want_y = dense(conv, x, graph, weights if weighted else None)
    want = torch.autograd.grad(want_y.square().sum(), leaves)
    assert_close("y", y, want_y)
    got, want = (torch.cat([g.flatten() for g in grads]) for grads in (got, want))
    assert_close("gradients", got, want, tolerance=1e-11)


def test_kinds_of_input_agree():
    edges, n = random_edge_index("random")
    edges = edges.unique(dim=1)
    weight = 0.5 + torch.rand(edges.shape[1])
    conv, x = GRANDConv(4, heads=2, T=2.0), torch.randn(n, 4)
    want, want_bare = conv(x, edges, weight), conv(x, edges)
    assert not torch.equal(want, want_bare)
    graph = gf.Graph.from_edge_index(edges, n, weight)
    adjacency = scipy.sparse.coo_array((weight.numpy(), edges.flip(0).numpy()), shape=(n, n))
    matrix = adjacency.tocsr()
    adj_t = torch.sparse_csr_tensor(matrix.indptr, matrix.indices, matrix.data, (n, n))
    for given in (graph, adj_t, adjacency):
        assert torch.equal(conv(x, given), want)
    index = EdgeIndex(edges.contiguous(), sparse_size=(n, n))
    for given in (graph.with_edge_weight(None), index, edges.int()):
        assert torch.equal(conv(x, given), want_bare)
        assert torch.equal(conv(x, given, weight), want)
    assert torch.equal(conv(x, graph, torch.ones_like(weight)), want_bare)


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint", "continuous"])
@pytest.mark.parametrize("variant", ["l", "nl"])
def test_edge_weights_have_a_gradient(variant, adjoint):
    edges, n = random_edge_index("random")
    weight = (0.5 + torch.rand(edges.shape[1], dtype=torch.float64)).requires_grad_()
    conv = GRANDConv(4, variant=variant, T=1.0, method="dopri5", rtol=1e-9, atol=1e-9).double()
    x = torch.randn(n, 4, dtype=torch.float64)
    grads = []
    for conv.adjoint in ("direct", adjoint):
        grads += torch.autograd.grad(conv(x, edges, weight).square().sum(), weight)
    assert float(grads[0].abs().max()) > 1e-3
    assert_close("gradient", grads[1], grads[0], tolerance=1e-6)


def test_in_a_pyg_network():
    edges, n = random_edge_index("loops")
    net = torch_geometric.nn.Sequential("x, edge_index", [
        (torch_geometric.nn.GCNConv(5, 8), "x, edge_index -> x"),
        torch.nn.ReLU(),
        (GRANDConv(8, heads=2, T=2.0), "x, edge_index -> x"),
        torch.nn.Linear(8, 3),
    ])  # fmt: skip
    net(torch.randn(n, 5), edges).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for name, p in net.named_parameters()
               if not name.endswith("key.bias"))  # fmt: skip  # which cancels in a softmax
    conv = GRANDConv(8)
    assert (conv.in_channels, conv.out_channels) == (8, 8)
    assert str(conv).startswith("GRANDConv(\n  variant=nl, T=1.0, method=rk4")


def test_a_batch_of_graphs_is_each_of_them():
    graphs = [random_edge_index(kind, 12) for kind in ("random", "empty_rows", "no_edges")]
    data = [Data(x=torch.randn(n, 4), edge_index=edges, num_nodes=n) for edges, n in graphs]
    batch, conv = Batch.from_data_list(data), GRANDConv(4, T=2.0)
    got = conv(batch.x, batch.edge_index)
    want = torch.cat([conv(each.x, each.edge_index) for each in data])
    assert_close("state", got, want.double())


def test_what_it_tells_of_its_solve_and_its_copies():
    edges, n = random_edge_index("random")
    conv, x = GRANDConv(4, T=3.0, regularizers=["kinetic"]), torch.randn(n, 4)
    assert conv.stats is None
    want = conv(x, edges)
    assert conv.stats.nfe == 12 and conv.status is gf.Status.SUCCESS and conv.t == 3.0
    assert conv.penalties["kinetic"].shape == (n,)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(other(x, edges), want)
    conv.eval()(x, edges)
    assert conv.penalties == {}
    before = conv.field.query.weight.detach().clone()
    conv.reset_parameters()
    assert not torch.equal(conv.field.query.weight, before)


def test_bad_input():
    edges, n = random_edge_index("random")
    conv, x = GRANDConv(4), torch.randn(n, 4)
    with pytest.raises(ValueError, match="GRANDConv: `variant` must be one of l, nl, got 'rw'"):
        GRANDConv(4, variant="rw")
    with pytest.raises(ValueError, match="`heads` must divide attention_channels=4, got 3"):
        GRANDConv(4, heads=3)
    with pytest.raises(ValueError, match=r"`x` must have shape \[N, channels\] = \[40, 4\]"):
        conv(torch.randn(n, 5), edges)
    with pytest.raises(ValueError, match=r"`edge_weight` must have shape \[E\] = \[200\]"):
        conv(x, edges, torch.ones(3))
    with pytest.raises(ValueError, match=r"`edge_weight` must have shape.*flatten"):
        conv(x, edges, torch.ones(200, 1))
    with pytest.raises(ValueError, match=r"`edge_index` must have shape \[2, E\]"):
        conv(x, edges.t())
    with pytest.raises(TypeError, match="`edge_index` must be an integer tensor"):
        conv(x, edges.tolist())


def test_sizes_may_be_of_numpy():
    conv = GRANDConv(np.int64(4), heads=np.int32(2), attention_channels=np.int64(6))
    model = gf.nn.GRAND(np.int64(4), np.int64(8), np.int64(3))
    edges, n = random_edge_index("random", 9)
    x = torch.randn(n, 4)
    assert conv(x, edges).shape == (n, 4) and model(x, edges).shape == (n, 3)
