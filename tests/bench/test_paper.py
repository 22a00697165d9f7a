"""The suite `paper`: runs resume, tables add up, every part writes its files."""

import argparse
import json
import re
import signal
import time
from dataclasses import replace

import pytest
import torch

import grand_fast.training.trainer
from bench.__main__ import main
from bench.core.harness import REPEAT_S, Budget
from bench.core.options import PAPER_DATASETS
from bench.core.report import Report
from bench.core.setting import setting
from bench.paper import (
    accuracy,
    jobs,
    peers,
    published,
    suite,
)
from bench.paper.comparison import Comparison, compare, mean_std, text
from bench.paper.jobs import Job, train, work
from bench.paper.store import Store
from tests._paper_runs import HEADER, OPTIONS, SMALL, run_row, small_job


def test_published_tables_are_whole():
    for table in (published.TABLE1, published.TABLE2):
        for values in table.values():
            assert set(published.GRAND_MODELS) <= set(values)
            assert all(50 < mean < 100 and 0 < std < 21 for mean, std in values.values())
    assert set(published.TABLE2) == set(published.FEATURES_CLASSES) == set(PAPER_DATASETS)
    best = {name: max(rows, key=rows.get) for name, rows in published.TABLE1.items()}
    assert best == {"Cora": "GRAND-l", "CiteSeer": "GRAND-nl-rw", "PubMed": "GRAND-nl-rw"}


def test_arithmetic_of_a_comparison():
    assert mean_std([0.8, 0.9]) == pytest.approx((85.0, 5.0))
    assert mean_std([]) is None
    assert text((84.66, 0.61)) == "84.7 ± 0.6"
    runs = [run_row(seed=0, accuracy=0.84), run_row(seed=1, accuracy=0.86),
            run_row(model="GCN", accuracy=0.1), run_row(seed=2, accuracy=None)]  # fmt: skip
    found = compare("Cora", "GRAND-l", published.TABLE1["Cora"], runs)
    assert found.runs == 2
    assert found.difference == pytest.approx(85.0 - 84.7)
    assert found.reached
    below = Comparison("Cora", "GRAND-l", (84.7, 0.6), (84.0, 0.1), 20)
    assert below.difference == pytest.approx(-0.7) and below.reached is False
    assert below.cells() == ["GRAND-l", "84.7 ± 0.6", "84.0 ± 0.1", "-0.7", "no", "20"]
    unknown = compare("Cora", "GODE", published.TABLE1["Cora"], runs)
    assert unknown.difference is None and unknown.reached is None


def test_store_keeps_what_is_current(tmp_path):
    path = tmp_path / "part.json"
    store = Store(path, HEADER, resume=True)
    row = small_job().row()
    assert store.find(row) is None
    store.add(row | {"test_accuracy": 0.5})
    again = Store(path, HEADER, resume=True)
    assert again.find(row)["test_accuracy"] == 0.5
    assert again.find(row)["commit"] == "abc"
    older = again.find(row)["options"]
    del older["entropy"]  # as if the option had come after the run; 0, its default, counts
    assert again.find(row)["test_accuracy"] == 0.5
    changed = small_job(lr=0.5).row()
    assert again.find(changed) is None  # a run of an older configuration does not count
    again.add(changed | {"test_accuracy": 0.6})
    assert len(again.runs) == 1
    again.add(small_job(seed=1).row())
    assert len(json.loads(path.read_text())["runs"]) == 2
    again.add(small_job(seed=1, component="largest").row())  # of another graph
    assert len(json.loads(path.read_text())["runs"]) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["part.json"]
    store.states.mkdir()
    assert Store(path, HEADER, resume=False).runs == []
    assert not store.states.exists()


def test_two_processes_may_fill_one_store(tmp_path):
    path = tmp_path / "part.json"
    one, other = (Store(path, HEADER, resume=resume) for resume in (False, True))
    one.add(small_job(seed=0).row())
    other.add(small_job(seed=1).row())
    one.add(small_job(seed=2).row())
    runs = Store(path, HEADER, resume=True).runs
    assert [run["seed"] for run in runs] == [0, 1, 2]
    assert one.runs == runs
    again = Store(path, HEADER, resume=False)
    again.add(small_job(seed=3).row())
    assert [run["seed"] for run in Store(path, HEADER, resume=True).runs] == [3]


def test_damaged_store_is_named(tmp_path):
    (tmp_path / "part.json").write_text('{"runs": [')
    with pytest.raises(ValueError, match="part.json must hold the runs .* --no-resume"):
        Store(tmp_path / "part.json", HEADER, resume=True)


def test_budget_interrupts():
    budget = Budget(0.05)
    with pytest.raises(KeyboardInterrupt), budget:
        time.sleep(5.0)
    assert budget.over
    with Budget(None) as unlimited:
        assert not unlimited.over


def test_budget_interrupts_after_what_is_left(monkeypatch):
    """By a clock of its own: the first two seconds were spent before."""
    now, asked = 100.0, []
    monkeypatch.setattr("bench.core.harness.signal.setitimer", lambda *args: asked.append(args))
    budget = Budget(7.0, clock=lambda: now)
    now = 102.0
    with budget:
        assert asked == [(signal.ITIMER_REAL, 5.0, REPEAT_S)]
        now = 106.9
        assert not budget.over
        now = 107.0
        assert budget.over
    assert asked[1:] == [(signal.ITIMER_REAL, 0.0)]
    with budget:
        assert asked[2] == (signal.ITIMER_REAL, 1e-3, REPEAT_S)  # at once; 0 would mean never


def test_second_call_goes_on(tmp_path, monkeypatch):
    wanted = [small_job(seed=0), small_job(seed=1), small_job("GCN", seed=0)]
    ran = []

    def fake(job, states):
        ran.append(str(job))
        return job.row() | {"test_accuracy": 0.5}

    monkeypatch.setattr(jobs, "train", fake)
    first = work(wanted[:1], Store(tmp_path / "p.json", HEADER, resume=True), Budget(None))
    assert len(first) == 1
    over = work(wanted, Store(tmp_path / "p.json", HEADER, resume=True), Budget(1e-9))
    assert len(over) == 1 and len(ran) == 1
    runs = work(wanted, Store(tmp_path / "p.json", HEADER, resume=True), Budget(None))
    assert ran == [str(job) for job in wanted]
    assert [run["model"] for run in runs] == ["GRAND-nl", "GRAND-nl", "GCN"]


def test_interrupted_run_ends_as_if_left_alone(tmp_path, monkeypatch):
    job = small_job(epochs=12)
    alone = train(job, tmp_path / "alone")
    store = Store(tmp_path / "p.json", HEADER, resume=True)
    step, calls = grand_fast.training.trainer.Trainer.epoch, []

    def interrupted(self, result):
        calls.append(len(result.history))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, result)

    monkeypatch.setattr(grand_fast.training.trainer.Trainer, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work([job], store, Budget(None))
    assert store.runs == []
    assert list((tmp_path / "p.state").iterdir())
    [run] = work([job], store, Budget(None))
    assert calls[6] > 0  # it did not begin anew
    for key in ("test_accuracy", "val_accuracy", "best_epoch", "epochs", "nfe_forward", "alpha"):
        assert run[key] == alone[key], key
    assert not list((tmp_path / "p.state").iterdir())


def test_a_failed_solve_is_a_result(tmp_path):
    job = small_job(method="explicit_adams", T=4000.0, step_size=40.0)
    run = train(job, tmp_path)
    assert run["diverged"] and run["stopped"]
    json.dumps(run, allow_nan=False)


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_learn(name, tmp_path):
    preset = replace(peers.peer_preset(name, SMALL), epochs=15)
    job = Job("digits", name, 0, preset, layers=2)
    run = train(job, tmp_path)
    assert run["test_accuracy"] > 0.5
    assert not run["diverged"]
    here = setting("digits", preset, 0)
    assert run["parameters"] == sum(
        p.numel() for p in peers.build(name, here.data, preset).parameters()
    )


def test_peers_take_the_same_data_and_split():
    data = replace(SMALL, split="planetoid", development=777, row_normalize=True)
    preset = peers.peer_preset("GAT", data)
    assert (preset.split, preset.development, preset.row_normalize) == ("planetoid", 777, True)
    with pytest.raises(ValueError, match="peer: must be one of GCN, .*, got 'GIN'"):
        peers.build("GIN", setting("digits", SMALL, 0).data, preset)


def test_residual_layers_keep_their_input():
    data = setting("digits", SMALL, 0).data
    preset = peers.peer_preset("GCN", SMALL)
    torch.manual_seed(0)
    plain = peers.build("GCN", data, preset, layers=3).eval()
    torch.manual_seed(0)
    residual = peers.build("GCN-residual", data, preset, layers=3).eval()
    with torch.no_grad():
        for model in (plain, residual):
            model.convolutions[1].lin.weight.zero_()  # the middle layer then gives 0
        assert plain(data.x, None).std(dim=0).max() < 1e-6
        assert residual(data.x, None).std(dim=0).max() > 1e-3


def test_ogbn_arxiv_is_in_table_2_on_its_own_split_where_it_is_named():
    chosen = argparse.Namespace(**(vars(OPTIONS) | {"datasets": ["ogbn-arxiv"]}))
    wanted = accuracy.jobs("table2", chosen)
    assert {job.model for job in wanted} >= {"GRAND-l", "GRAND-nl", "GRAND-nl-rw", "GCN"}
    assert {(job.dataset, job.preset.split) for job in wanted} == {("ogbn-arxiv", "public")}


@pytest.mark.parametrize(("part", "datasets", "models"), [("table1", 3, 7), ("table2", 6, 8)])
def test_jobs_of_the_tables(part, datasets, models):
    wanted = accuracy.jobs(part, OPTIONS)
    assert len(wanted) == 2 * datasets * models
    assert [job.seed for job in wanted] == [0] * (datasets * models) + [1] * (datasets * models)
    assert {job.preset.split for job in wanted} == {accuracy.SPLITS[part]}
    chosen = argparse.Namespace(**(vars(OPTIONS) | {"datasets": ["PubMed"], "seeds": None}))
    assert len(accuracy.jobs(part, chosen)) == accuracy.SEEDS[part] * models


def test_table_prints_paper_ours_difference(capsys, tmp_path):
    some = argparse.Namespace(**(vars(OPTIONS) | {"models": ["GRAND-nl", "GAT"]}))
    assert {job.model for job in accuracy.jobs("table1", some)} == {"GRAND-nl", "GAT"}
    chosen = argparse.Namespace(**(vars(OPTIONS) | {"datasets": ["Cora"]}))
    wanted = accuracy.jobs("table1", chosen)
    runs = [run_row(job.model, job.seed, accuracy=0.85) for job in wanted]
    report = Report("paper", HEADER)
    accuracy.show("table1", runs, wanted, report)
    out = capsys.readouterr().out
    assert "initialisations: 2" in out
    line = next(line for line in out.splitlines() if line.startswith("| GRAND-l "))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "GRAND-l", "84.7 ± 0.6", "85.0 ± 0.0", "+0.3", "yes", "2",
    ]  # fmt: skip
    figures = {figure["figure"]: figure["value"] for figure in report.figures}
    assert figures["table1 Cora: best variant less the paper's best"] == pytest.approx(0.3)
    accuracy.draw("table1", runs, wanted, tmp_path / "table1.png")
    assert (tmp_path / "table1.png").stat().st_size > 0


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "DATASETS", {"table2": ("digits",)})
    monkeypatch.setattr(accuracy, "TABLE_PEERS", {"table2": ("GCN",)})
    monkeypatch.setattr(accuracy, "PUBLISHED", {"table2": {"digits": {"GRAND-l": (95.0, 1.0)}}})
    quantile = {"nl-rw": 0.2}
    monkeypatch.setattr(accuracy, "configuration", lambda dataset, variant: replace(
        SMALL, variant=variant, attention_quantile=quantile.get(variant)))  # fmt: skip
    monkeypatch.setattr(accuracy, "peer_preset", lambda name, data: replace(
        peers.peer_preset(name, data), epochs=3))  # fmt: skip
    command = ["paper", "--part", "table2", "--seeds", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    content = json.loads((tmp_path / "table2.json").read_text())
    assert [run["model"] for run in content["runs"]] == [*published.GRAND_MODELS, "GCN"]
    assert (tmp_path / "table2.png").stat().st_size > 0
    assert "| GRAND-l" in capsys.readouterr().out
    monkeypatch.setattr(jobs, "train", None)  # nothing is trained again
    assert main(command) == 0
    assert main(["paper", "--part", "parameters", "--datasets", "PubMed", "--out", str(tmp_path),
                 "--json", str(tmp_path / "all.json")]) == 0  # fmt: skip
    assert "parameters, PubMed" in capsys.readouterr().out
    assert {row["model"] for row in json.loads((tmp_path / "parameters.json").read_text())["rows"]}
    assert json.loads((tmp_path / "all.json").read_text())["rows"][0]["part"] == "parameters"


def test_bad_options(capsys, tmp_path):
    for arguments in (["--part", "table9"], ["--budget", "0"], ["--datasets", "Reddit"]):
        with pytest.raises(SystemExit) as stop:
            main(["paper", *arguments])
        assert stop.value.code == 2
    assert "must be one of Cora" in capsys.readouterr().err
    for arguments, words in (
        ("table1 --datasets Cora Photo", "must be of --part table1, Cora, CiteSeer, PubMed, got P"),
        ("table1 --models GS-mean", "must be of --part table1, GRAND-l, .*GS-maxpool, got GS-mean"),
        ("depth --datasets Cora", "--datasets is not used by --part depth"),
        ("parameters --models GAT", "--models is not used by --part parameters"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["paper", "--out", str(tmp_path), "--part", *arguments.split()])
        assert stop.value.code == 2
        assert re.search(words, capsys.readouterr().err)


def test_a_part_without_what_is_asked_for_is_said(tmp_path):
    report = Report("paper", HEADER)
    asked = {"part": None, "datasets": ["Photo"], "out": tmp_path}
    suite._train("table1", argparse.Namespace(**(vars(OPTIONS) | asked)), report, tmp_path)
    assert report.skipped == ["table1: it has none of the data sets and models asked for."]
