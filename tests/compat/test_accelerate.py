"""`accelerate`: which layers of a model become ours, and that nothing else of it changes."""

import copy
import io
import logging
import pickle

import pytest
import torch
import torch_geometric.nn as pyg

import grand_fast as gf
from grand_fast.nn import message_passing
from grand_fast.testing import assert_close, random_edge_index

IN, CLASSES = 6, 4


class Halved(pyg.GATConv):
    def message(self, x_j, alpha):
        return 0.5 * alpha.unsqueeze(-1) * x_j


class Model(torch.nn.Module):
    """Layers in several places, one of them twice."""

    def __init__(self):
        super().__init__()
        self.blocks = pyg.GAT(IN, IN, 2, heads=2, v2=False, dropout=0.5)
        self.twice = self.again = pyg.TransformerConv(IN, IN // 2, heads=2, beta=True)
        self.halved, self.gcn = Halved(IN, IN, heads=1), pyg.GCNConv(IN, CLASSES)

    def forward(self, x, edges):
        return self.gcn(self.halved(self.again(self.twice(self.blocks(x, edges), edges), edges),
                                    edges), edges)  # fmt: skip


@pytest.fixture(autouse=True)
def _reference():
    with gf.backend("reference"):
        yield


def inputs():
    edges, n = random_edge_index("loops", 14)
    return torch.randn(n, IN), edges


def loss_and_gradients(model, given):
    torch.manual_seed(2)
    loss = model(*given).square().sum()
    return torch.cat([loss[None], *(g.flatten() for g in
                                    torch.autograd.grad(loss, [*model.parameters()]))])  # fmt: skip


def test_a_model_trains_as_before(monkeypatch):
    ran = []
    monkeypatch.setattr(
        message_passing, "spmm", lambda *a, **k: ran.append(1) or gf.ops.spmm(*a, **k)
    )
    model, given, report = Model(), inputs(), gf.compat.Report()
    before, state = copy.deepcopy(model), model.state_dict()
    assert gf.compat.accelerate(model, report=report) is model
    assert report.used == {"GATConv": 2, "TransformerConv": 1}
    assert set(report.left) == {("Halved", "its class is below PyG's"),
                                ("GCNConv", "there is no such layer here")}  # fmt: skip
    assert repr(model) == repr(before) and type(model.twice) is gf.nn.TransformerConv
    assert model.state_dict().keys() == state.keys()
    got, want = (loss_and_gradients(m, given) for m in (model, before))
    assert_close("training with dropout", got, want)
    assert len(ran) == 2

    once = copy.deepcopy(model.state_dict())
    gf.compat.accelerate(model, report=report)
    assert report.used == {"GATConv": 2, "TransformerConv": 1}
    assert all(torch.equal(once[name], p) for name, p in model.state_dict().items())


def test_copies_pickles_and_files():
    model, given = gf.compat.accelerate(Model()).eval(), inputs()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    want = model(*given)
    pickled, saved = pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    for again in (copy.deepcopy(model), pickled, saved):
        assert torch.equal(again(*given), want)
        assert type(again.twice) is gf.nn.TransformerConv


def test_what_is_left(monkeypatch, caplog):
    layers = {
        "two sets of nodes": pyg.GATConv((IN, IN), 2),
        "not added up": pyg.TransformerConv(IN, 2, aggr="max"),
        "forward": pyg.GATConv(IN, 2),
        "lazy": pyg.TransformerConv(-1, 2, edge_dim=-1),
        "broken": pyg.GATConv(IN, 2),
    }
    layers["forward"].forward = layers["forward"].forward
    layers["broken"].fill_value, layers["broken"].att_src = None, None
    with caplog.at_level(logging.INFO, logger="grand_fast"):
        gf.compat.accelerate(torch.nn.ModuleList(layers.values()))
    assert [n for n, m in layers.items() if type(m).__module__.startswith("grand_fast")] == ["lazy"]
    for reason in ("two sets of nodes", "not added up", "forward is of its own", "copy failed"):
        assert reason in caplog.text


@pytest.mark.parametrize("name", ["GATConv", "TransformerConv"])
def test_a_layer_of_another_formula_is_left(monkeypatch, name):
    """As PyG's may have in a later version."""
    attended = message_passing.attended
    module = f"grand_fast.nn.{'gat_conv' if name == 'GATConv' else 'transformer_conv'}"

    def other(layer, values, q, k, **further):
        return attended(layer, values, 1.01 * q, k, **further)

    monkeypatch.setattr(f"{module}.attended", other)
    layer, report, state = getattr(pyg, name)(IN, 3, heads=2), gf.compat.Report(), torch.random
    before = state.get_rng_state()
    gf.compat.accelerate(layer, report=report)
    assert type(layer) is getattr(pyg, name) and not report.used
    assert "the probe disagrees" in str(report) and torch.equal(before, state.get_rng_state())
    gf.compat.accelerate(layer, report=report, verify=False)
    assert type(layer) is getattr(gf.nn, name) and report.used == {name: 1}


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"^accelerate: `model` must be a Module, got list\.$"):
        gf.compat.accelerate([Model()])
