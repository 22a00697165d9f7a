"""Features that are mostly zeros are kept sparse, from the files to the trained weights."""

from dataclasses import replace

import pytest
import torch

from bench.core.setting import Setting
from bench.models import epoch as epochs
from bench.paper import jobs
from grand_fast.data import datasets
from grand_fast.data.features import compact, is_sparse
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.testing import assert_close
from grand_fast.training import loop
from grand_fast.training.prepare import describe, prepared
from grand_fast.training.presets import Preset
from tests._small_run import N, two_rings

WORDS = 50
SMALL = Preset(hidden=8, heads=2, attention_channels=8, T=2.0, method="dopri5", tol_scale=800.0)
MODEL = {"in_channels": WORDS, "hidden_channels": 8, "out_channels": 2, "heads": 2, "T": 2.0}


def bag_of_words(dtype=torch.float32):
    """The two rings; a node has few words of many, and those of its ring more often."""
    own = two_rings()
    chance = torch.where(torch.arange(WORDS) % 2 == own.y[:, None], 0.12, 0.04)
    words = torch.rand(N, WORDS, generator=torch.Generator().manual_seed(0)) < chance
    words[7] = False  # a node without words
    return replace(own, x=words.to(dtype))


def sparse(own):
    return replace(own, x=own.x.to_sparse_csr())


def test_compact():
    few, many = torch.zeros(10, 10), torch.zeros(10, 10)
    few.view(-1)[:20] = 1.0  # a fifth
    many.view(-1)[:21] = 1.0
    assert is_sparse(compact(few)) and torch.equal(compact(few).to_dense(), few)
    assert compact(many) is many
    kept = compact(few)
    assert compact(kept) is kept


def test_row_normalized_is_that_of_dense_features():
    own = replace(bag_of_words(), x=bag_of_words().x * torch.rand(N, 1))
    got, want = datasets.row_normalized(sparse(own)), datasets.row_normalized(own)
    assert is_sparse(got.x)
    assert_close("x", got.x.to_dense(), want.x)


def test_largest_component_is_that_of_dense_features():
    own = bag_of_words()
    ids = torch.arange(N)
    # A few nodes of each ring lose their edges
    alone = torch.isin(own.edge_index, ids[::7]).any(0)
    own = replace(own, edge_index=own.edge_index[:, ~alone])
    got, want = datasets.largest_component(sparse(own)), datasets.largest_component(own)
    assert is_sparse(got.x) and 0 < got.num_nodes < N
    assert torch.equal(got.x.to_dense(), want.x) and torch.equal(got.y, want.y)
    assert torch.equal(got.edge_index, want.edge_index)


def test_fingerprint():
    own = sparse(bag_of_words())
    wider = torch.cat([own.x.to_dense(), torch.zeros(N, 1)], dim=1).to_sparse_csr()
    others = [own, replace(own, x=2 * own.x), replace(own, x=wider)]
    assert len({datasets.fingerprint(other) for other in others}) == 3
    assert datasets.fingerprint(own) == datasets.fingerprint(sparse(bag_of_words()))


def test_prepared_data_are_sparse_where_that_pays():
    preset = Preset(split="public", row_normalize=True)
    own = bag_of_words()
    given = prepared("rings", preset, own=own)
    assert is_sparse(given.x)
    assert_close("x", given.x.to_dense(), datasets.row_normalized(own).x)
    assert "% of them nonzero, kept sparse)" in describe(given, own.public_split, preset)
    dense = prepared("rings", preset, own=two_rings())
    assert not is_sparse(dense.x)
    assert "nonzero" not in describe(dense, own.public_split, preset)


def fit(own, graph, seed=0, **more):
    torch.manual_seed(seed)
    model = GRAND(**MODEL, dropout=more.pop("dropout", 0.0)).to(own.x.dtype)
    model.input_dropout = more.pop("input_dropout", 0.0)
    options = {"epochs": 30, "lr": 0.02} | more
    return loop.fit(model, own, graph, own.public_split, **options)


def test_training_gives_the_weights_of_dense_features(one_thread):
    own = bag_of_words(torch.float64)
    graph = Graph.from_edge_index(own.edge_index, N)
    got, want = fit(sparse(own), graph), fit(own, graph)
    assert got.test_accuracy == want.test_accuracy > 0.8
    assert got.best_epoch == want.best_epoch
    for name, weight in want.weights.items():
        assert_close(name, got.weights[name], weight, tolerance=1e-7)


def test_training_goes_on_to_the_same_weights(one_thread, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STATE_SHARE", float("inf"))
    own = sparse(bag_of_words())
    graph = Graph.from_edge_index(own.edge_index, N)
    options = {"dropout": 0.3, "input_dropout": 0.4}
    whole = fit(own, graph, epochs=6, **options)
    fit(own, graph, epochs=3, state=tmp_path / "state", **options)
    rest = fit(own, graph, seed=5, epochs=6, state=tmp_path / "state", **options)
    assert [e.loss for e in rest.history] == [e.loss for e in whole.history]
    assert all(torch.equal(w, rest.weights[name]) for name, w in whole.weights.items())


def test_the_released_code_gets_dense_features():
    preset = replace(SMALL, input_dropout=0.5)
    problem = epochs.tiny("PubMed", preset)
    here = problem.here
    x = here.data.x * (torch.rand(here.data.x.shape) < 0.2)
    here = replace(here, data=replace(here.data, x=x.to_sparse_csr()))
    problem = replace(problem, here=here)
    assert epochs.check_same(problem, epochs.RELEASED) <= epochs.NEAR
    for make in epochs.competitors(problem).values():
        epochs.epoch(problem, make(problem))()


@pytest.mark.parametrize("name", ["GCN", "GS-mean", "GRAND-nl"])
def test_peers_get_dense_features(name, tmp_path, monkeypatch):
    own = sparse(bag_of_words())
    here = Setting(own, Graph.from_edge_index(own.edge_index, N), own.public_split)
    monkeypatch.setattr(jobs, "setting", lambda *_: here)
    preset = replace(SMALL, epochs=2)
    run = jobs.train(jobs.Job("rings", name, 0, preset), tmp_path)
    assert run["epochs"] == 2 and not run["diverged"]
