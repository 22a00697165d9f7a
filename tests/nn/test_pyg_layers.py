"""`TransformerConv` and `GATConv` against PyG's own, with the same weights."""

import copy
import pickle

import pytest
import torch
import torch_geometric.nn as pyg
from torch_geometric import EdgeIndex
from torch_geometric.nn.aggr import SumAggregation

import grand_fast as gf
from grand_fast.graph import Graph
from grand_fast.nn import message_passing
from grand_fast.testing import assert_close, random_edge_index
from tests._pairwise import pairwise

N, IN, D, EDGE_DIM = 14, 5, 4, 3
KINDS = ("random", "empty_rows", "hub", "loops", "repeated", "no_edges")
TOLERANCE = 1e-11  # PyG adds 1e-16 to the sums of its softmax; the rest is rounding
FILLS = {"mean": "mean", "0.5": 0.5, "max": "max", "tensor": torch.tensor([0.1, 0.2, 0.3])}
CLASSES = ("TransformerConv", "GATConv")


@pytest.fixture(autouse=True)
def reasons(monkeypatch):
    """Why calls ran by PyG's code."""
    found = []
    monkeypatch.setattr(message_passing, "_say_once", lambda name, reason: found.append(reason))
    return found


def pair(name, **options):
    """PyG's layer and ours with its weights, which are random, biases too."""
    layers = [getattr(package, name)(IN, D, **options).double() for package in (pyg, gf.nn)]
    with torch.no_grad():
        for p in layers[0].parameters():
            p.normal_()
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


def inputs(kind, edge_dim=None):
    edges, n = random_edge_index(kind, N)
    x = torch.randn(n, IN, dtype=torch.float64, requires_grad=True)
    if edge_dim is None:
        return x, edges, None
    return x, edges, torch.randn(edges.shape[1], edge_dim, dtype=torch.float64, requires_grad=True)


def results(layer, given, **further):
    """The result, weights and their edges if they are asked for, and all gradients in one."""
    torch.manual_seed(3)
    y, weights = layer(*given, **further), None
    if isinstance(y, tuple):
        y, (edges, weights) = y
    loss = (y.sin() * y).sum() + (0 if weights is None else weights.square().sum())
    leaves = [t for t in (given[0], given[2], *layer.parameters()) if t is not None]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = {"y": y, "used": torch.tensor([float(g is not None) for g in grads])}
    found["gradients"] = torch.cat([g.flatten() for g in grads if g is not None])
    return found if weights is None else found | {"weights": weights, "edges": edges.double()}


def compare(layers, given, **further):
    theirs, ours = (results(layer, given, **further) for layer in layers)
    assert theirs.keys() == ours.keys()
    for name, want in theirs.items():
        assert_close(name, ours[name], want, tolerance=TOLERANCE)


def covered(edge_dim, dropout, wanted):
    return edge_dim is None or not (dropout or wanted)


@pairwise(
    kind=KINDS, heads=(1, 3), concat=(True, False), beta=(False, True), edge_dim=(None, EDGE_DIM),
    bias=(True, False), root_weight=(True, False), dropout=(0.0, 0.4), wanted=(None, False),
    flow=("source_to_target", "target_to_source"),
)  # fmt: skip
def test_transformer_conv(
    backend, reasons, kind, heads, concat, beta, edge_dim, bias, root_weight, dropout, wanted, flow
):
    layers = pair("TransformerConv", heads=heads, concat=concat, beta=beta, edge_dim=edge_dim,
                  bias=bias, root_weight=root_weight, dropout=dropout, flow=flow)  # fmt: skip
    with gf.backend(backend):
        compare(layers, inputs(kind, edge_dim), return_attention_weights=wanted)
    assert bool(reasons) is not covered(edge_dim, dropout, wanted is False)


@pairwise(
    kind=KINDS, heads=(1, 3), concat=(True, False), edge_dim=(None, EDGE_DIM), loops=(True, False),
    fill_value=FILLS, bias=(True, False), residual=(False, True),
    dropout=(0.0, 0.4), wanted=(None, True), flow=("source_to_target", "target_to_source"),
)  # fmt: skip
def test_gat_conv(
    backend, reasons, kind, heads, concat, edge_dim, loops, fill_value, bias, residual, dropout,
    wanted, flow,
):  # fmt: skip
    layers = pair("GATConv", heads=heads, concat=concat, edge_dim=edge_dim, add_self_loops=loops,
                  fill_value=fill_value, bias=bias, residual=residual, dropout=dropout, flow=flow,
                  negative_slope=0.3)  # fmt: skip
    with gf.backend(backend):
        compare(layers, inputs(kind, edge_dim), return_attention_weights=wanted)
    assert bool(reasons) is not covered(edge_dim, dropout, bool(wanted))


@pytest.mark.parametrize("name", CLASSES)
def test_adjacency_by_receivers(reasons, name):
    """PyG's `adj_t`; its values are no weights of these layers."""
    x, edges, _ = inputs("loops")
    matrix = torch.zeros(N, N, dtype=torch.float64)
    matrix[edges[1], edges[0]] = 2.0
    with gf.backend("reference"):
        compare(pair(name, heads=2), (x, matrix.to_sparse_csr(), None))
        assert not reasons
        compare(pair(name, heads=2), (x, matrix.to_sparse_coo(), None))
    assert reasons


@pytest.mark.parametrize("name", CLASSES)
def test_edges_are_sorted_once(monkeypatch, name):
    built = []
    sort = Graph._sorted.__func__

    def counted(cls, *args):
        built.append(1)
        return sort(cls, *args)

    monkeypatch.setattr(Graph, "_sorted", classmethod(counted))
    layers, given = pair(name), inputs("loops")
    with gf.backend("reference"):
        for layer in (layers[1], copy.deepcopy(layers[1])):
            layer(*given)
        assert len(built) == 1
        given[1][0, 0] = 1 - given[1][0, 0].clamp(max=1)
        compare(layers, given)
    assert len(built) == 2


class Doubled(gf.nn.GATConv):
    def message(self, x_j, alpha):
        return 2 * alpha.unsqueeze(-1) * x_j


class Named(gf.nn.GATConv):
    """Passes messages as its base does."""

    def forward(self, x, edge_index):
        return super().forward(x, edge_index).relu()


def hooked(layer):
    layer.register_message_forward_hook(lambda module, given, result: 3 * result)


def explained(layer):
    layer.explain, layer._edge_mask = True, torch.linspace(0, 1, 5 * N)


def added_otherwise(layer):
    layer.aggr_module = SumAggregation()
    layer.aggr_module.register_forward_hook(lambda module, given, result: 3 * result)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("options", "change"),
    [({"aggr": "mean"}, None), ({}, hooked), ({}, explained), ({}, added_otherwise)],
    ids=["mean", "hook", "explained", "hook of the sum"],
)
def test_other_ways_are_pygs(reasons, name, options, change):
    if name == "GATConv":
        options = options | {"add_self_loops": False}
    layers, given = pair(name, **options), inputs("random")
    for layer in layers:
        if change is not None:
            change(layer)
    theirs, ours = (layer(*given) for layer in layers)
    assert torch.equal(theirs, ours) and reasons


@pytest.mark.parametrize("name", CLASSES)
def test_other_input_is_pygs(reasons, name):
    layers, (x, edges, _) = pair(name), inputs("random")
    two_sets = (x, x[:9])
    few = edges[:, edges[1] < 9]
    known = EdgeIndex(edges, sparse_size=(N, N))
    for given in ((two_sets, few), (x, known)):
        theirs, ours = (layer(*given) for layer in layers)
        assert torch.equal(theirs, ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = (layer.float()(x.float(), edges) for layer in layers)
    assert torch.equal(theirs, ours) and theirs.dtype is ours.dtype
    assert len(reasons) == 3


def test_subclasses(reasons):
    x, edges, _ = inputs("random")
    plain = gf.nn.GATConv(IN, D, bias=False).double()
    layers = [cls(IN, D, bias=False).double() for cls in (Doubled, Named)]
    for layer in layers:
        layer.load_state_dict(plain.state_dict())
    with gf.backend("reference"):
        y, twice, positive = plain(x, edges), layers[0](x, edges), layers[1](x, edges)
    assert_close("twice", twice, 2 * y)
    assert torch.equal(positive, y.relu())
    assert reasons == ["a part of its message passing is of its own"]


BAD = {
    "static graph": lambda x, e: (x[None], e),
    "ids above": lambda x, e: (x, e + 1),
    "ids below": lambda x, e: (x, e - 1),
    "floats": lambda x, e: (x, e.double()),
    "int32": lambda x, e: (x, e.int()),
    "three rows": lambda x, e: (x, torch.cat([e, e[:1]])),
    "one dimension": lambda x, e: (x, e[0]),
    "no tensor": lambda x, e: (x, e.tolist()),
    "columns": lambda x, e: (x[:, 1:], e),
    "dtype": lambda x, e: (x.float(), e),
    "few features": lambda x, e: (x, e, torch.randn(3, EDGE_DIM, dtype=torch.float64)),
    "narrow features": lambda x, e: (x, e, torch.randn(5 * N, 2, dtype=torch.float64)),
    "no features": lambda x, e: (x, e, None),
    "matrix of another size": lambda x, e: (x, torch.eye(N + 1).to_sparse_csr()),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_is_refused_as_by_pyg(name, bad):
    layers, (x, edges, _) = pair(name, edge_dim=EDGE_DIM), inputs("random")
    if len(bad(x, edges)) == 2:
        layers = pair(name)
    outcomes = []
    for layer in layers:
        try:
            with gf.backend("reference"):
                outcomes.append(layer(*bad(x, edges)).shape)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", CLASSES)
def test_copies_pickles_and_states(name):
    theirs, ours = pair(name, heads=2, edge_dim=EDGE_DIM)
    given = inputs("random", EDGE_DIM)
    theirs.load_state_dict(ours.state_dict())
    assert repr(theirs) == repr(ours) and list(theirs.state_dict()) == list(ours.state_dict())
    with gf.backend("reference"):
        want = ours(*given)
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(again(*given), want)
            compare((theirs, again), given, return_attention_weights=True)  # by PyG's code
    assert type(ours).__module__.startswith("grand_fast.nn.")


@pytest.mark.parametrize("name", CLASSES)
def test_columns_that_come_with_the_first_call(name):
    """The same seed gives the same weights."""
    given, layers = inputs("random", EDGE_DIM), []
    options = {"residual": True} if name == "GATConv" else {}
    with gf.backend("reference"):
        for package in (pyg, gf.nn):
            torch.manual_seed(0)
            layers.append(getattr(package, name)(-1, D, edge_dim=-1, **options).double())
            layers[-1](*given)
        compare(layers, given)


def test_features_of_no_edges():
    layers = pair("GATConv", edge_dim=EDGE_DIM, add_self_loops=False)
    given = inputs("no_edges", EDGE_DIM)
    with gf.backend("reference"):
        assert torch.equal(*(layer(*given) for layer in layers))


def test_explained_for_a_while(reasons):
    """PyG then leaves a part in the layer."""
    layer, given = pair("GATConv")[1], inputs("random")
    layer.explain = True
    layer.explain = False
    with gf.backend("reference"):
        layer(*given)
    assert not reasons
    layer.propagate = lambda edges, **given: given["x"][0]
    layer(*given)
    assert reasons


def test_a_hook_of_a_projection_is_heard():
    layers, given = pair("GATConv", edge_dim=EDGE_DIM), inputs("random", EDGE_DIM)
    for layer in layers:
        layer.lin_edge.register_forward_hook(lambda module, given, result: 3 * result)
    with gf.backend("reference"):
        compare(layers, given)


def test_compiled_as_pyg(monkeypatch):
    monkeypatch.undo()  # a log would break the program in two
    layer, given = pair("GATConv")[1], inputs("random")
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with gf.backend("reference"):
        assert_close("compiled", compiled(*given), layer(*given))
