"""The suite `models`: configurations, agreement with the released sequence, its figures."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.core import graphs, machine
from bench.core.problem import MODES, OURS, Shape
from bench.core.report import Report
from bench.models import epoch as epochs
from bench.models import layers, suite
from bench.models.released import Continuous, ReleasedModel
from grand_fast.training.presets import Preset

SMALL = Preset(hidden=8, heads=2, attention_channels=8, T=2.0, method="dopri5", tol_scale=800.0)


def tiny(dataset: str = "PubMed", **changes: object) -> epochs.Problem:
    return epochs.tiny(dataset, replace(SMALL, **changes))


@pytest.mark.parametrize("variant", ["l", "nl"])
@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("name", [epochs.RELEASED, epochs.RELEASED_DIRECT, epochs.OURS_CONTINUOUS])
def test_competitors_give_our_logits(variant, source, name):
    problem = tiny(variant=variant, source=source)
    if source:
        with torch.no_grad():
            problem.model.field.scale.beta.fill_(0.3)
    assert epochs.check_same(problem, name) <= epochs.NEAR


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": "squareplus", "normalize": "sender"},
        {"score": "cosine", "normalizer": "squareplus"},
        {"score": "exp_kernel"},
    ],
    ids=str,
)
def test_tuned_attention_is_the_released_one(changes):
    assert epochs.check_same(tiny(**changes), epochs.RELEASED) <= epochs.NEAR


def test_another_model_gets_no_time(monkeypatch):
    problem = tiny()
    made = epochs.competitors(problem)

    def other(p):
        model = made[epochs.RELEASED](p)
        with torch.no_grad():
            model.decoder.bias += 1.0
        return model

    monkeypatch.setattr(epochs, "competitors", lambda p: {epochs.RELEASED: other})
    with pytest.raises(AssertionError, match="logits at tight tolerances differ"):
        epochs.check_same(problem, epochs.RELEASED)


def test_gradients_through_the_solver_are_ours():
    problem = tiny("Cora", dropout=0.0, input_dropout=0.0, method="rk4", tol_scale=None)
    found = {}
    for name, make in epochs.competitors(problem).items():
        model = make(problem)
        epochs.epoch(problem, model)()
        assert epochs.evaluations(model, problem) == (8, 0)
        found[name] = {key: p.grad for key, p in model.named_parameters()}
    ours, released = found[OURS], found[epochs.RELEASED]
    for key in ("encoder.weight", "decoder.weight"):
        torch.testing.assert_close(released[key], ours[key], rtol=1e-3, atol=1e-6)
    for key in ("query.weight", "key.weight", "scale.alpha_logit"):
        want = ours[f"field.{key}"]
        torch.testing.assert_close(released[f"field.layer.{key}"], want, rtol=1e-3, atol=1e-6)


def test_an_epoch_leaves_the_weights():
    problem = tiny()
    model = epochs.competitors(problem)[OURS](problem)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    call = epochs.epoch(problem, model)
    call()
    call()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.encoder.weight.grad.abs().sum() > 0


def test_adjoint_of_the_linear_model_leaves_queries_and_keys():
    problem = tiny(variant="l")
    model = ReleasedModel(problem.model, problem.here.graph, Continuous("adaptive_heun", 1e4))
    epochs.epoch(problem, model)()
    assert model.field.layer.query.weight.grad is None
    assert model.encoder.weight.grad is not None
    forward, backward = epochs.evaluations(model, problem)
    assert forward > 0 and backward > 0


def test_what_keeps_every_edge_is_refused(monkeypatch):
    problem = tiny()
    epochs.require_memory(problem, epochs.RELEASED_DIRECT)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: argparse.Namespace(available=1e6))
    with pytest.raises(machine.DoesNotFitError, match="PubMed nl, released, through the solver"):
        epochs.require_memory(problem, epochs.RELEASED_DIRECT)
    epochs.require_memory(problem, OURS)


def test_suite_reports_ratios_and_bars(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "setup", lambda dataset, variant: tiny(dataset, variant=variant))
    peaks = {OURS: 1e8, epochs.RELEASED: 6e8}

    def fake(task, **values):
        assert task is epochs.peak_memory
        bytes_above = peaks.get(values["competitor"], 2e8)
        return {"bytes": bytes_above, "process_bytes": bytes_above + 1e9}

    monkeypatch.setattr(suite.fresh, "run", fake)
    report = Report("models", {})
    options = argparse.Namespace(
        dataset="PubMed", variant="nl", layer=None, quick=True, rounds=3, out=tmp_path
    )
    suite.run(options, report)
    assert not report.failed
    assert {row["competitor"] for row in report.rows} == {
        OURS, epochs.RELEASED, epochs.RELEASED_DIRECT, epochs.OURS_CONTINUOUS,
    }  # fmt: skip
    figures = {figure["figure"]: figure for figure in report.figures}
    memory = figures["PubMed GRAND-nl, an epoch, peak memory: released over ours"]
    assert memory["value"] == pytest.approx(6.0) and memory["unit"] == "× (bar 5)"
    rows = {row["competitor"]: row for row in report.rows}
    time = figures["PubMed GRAND-nl, an epoch, time: released over ours"]
    ratio = rows[epochs.RELEASED]["median_s"] / rows[OURS]["median_s"]
    assert time["value"] == pytest.approx(ratio)
    assert time["unit"] == "× (bar 8)"
    assert "6.00×" in capsys.readouterr().out
    assert (tmp_path / suite.PICTURE).stat().st_size > 0


def test_layers_of_pyg(monkeypatch, capsys, tmp_path):
    name = "TransformerConv"

    def measured(task, **values):
        return {key: value + 1e6 for key, value in task(**values).items()}  # so small, it may be 0

    monkeypatch.setattr(layers.fresh, "run", measured)
    monkeypatch.setattr(layers, "_graph", lambda dataset: graphs.load("random", nodes=60))
    monkeypatch.setattr(layers, "SHAPES", {"PubMed": (Shape(8, 2, 8),)})
    file = tmp_path / "layers.json"
    assert main(["models", "--layer", name, "--rounds", "1", "--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {(row["competitor"], row["mode"]) for row in found["rows"]} == {
        (competitor, mode) for competitor in (OURS, layers.PYG) for mode in MODES
    }
    assert [figure["unit"] for figure in found["figures"]] == ["× (bar 2.5)", "× (bar 4)"]
    assert f"{name} 8/2/8, PubMed, 60 nodes" in capsys.readouterr().out

    monkeypatch.setitem(layers.PACKAGES, OURS, argparse.Namespace(**{name: lambda *sizes: (
        getattr(layers.PACKAGES[layers.PYG], name)(*sizes, aggr="mean"))}))  # fmt: skip
    assert main(["models", "--layer", name, "--rounds", "1", "--quick"]) == 1
    assert "disagrees with PyG's layer: PubMed 8/2/8: grand-fast: out" in capsys.readouterr().out


def test_peak_memory_of_an_epoch(monkeypatch):
    monkeypatch.setattr(epochs, "setup", lambda dataset, variant: tiny(dataset, variant=variant))
    peak = epochs.peak_memory("PubMed", "nl", epochs.RELEASED)
    assert 0 <= peak["bytes"] < peak["process_bytes"]


def test_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "setup", lambda dataset, variant: tiny(dataset, variant=variant))
    monkeypatch.setattr(
        suite.fresh, "run", lambda task, **values: {"bytes": 1, "process_bytes": 2e9}
    )
    command = ["models", "--dataset", "ogbn-arxiv", "--quick", "--json", str(tmp_path / "m.json")]
    assert main(command) == 0
    assert "whole process" in capsys.readouterr().out
    values = json.loads((tmp_path / "m.json").read_text())
    assert [row["competitor"] for row in values["rows"]] == [OURS]
    assert {"figure": "ogbn-arxiv GRAND-nl, an epoch, whole process", "value": 2.0,
            "unit": "GB (bar 4)"} in values["figures"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["models", "--dataset", "Photo"])
    assert "must be one of Cora, PubMed" in capsys.readouterr().err
