"""A run that was stopped, at any moment and in any way, ends with the weights of one left alone."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grand_fast import checkpoint, plots, train
from grand_fast.arguments import BadOptionError
from grand_fast.checkpoint import WEIGHTS_FILE, load_state
from grand_fast.data import NodeData, Split
from grand_fast.experiment import Experiment, run_seeds
from grand_fast.graph import Graph
from grand_fast.metrics import COLUMNS, METRICS_FILE
from grand_fast.nn import GRAND
from grand_fast.optimizers import OPTIMIZERS
from grand_fast.presets import Preset
from grand_fast.run_folder import RUN_FILE, SEEDS_FOLDER

N = 60
MODEL = {
    "in_channels": 5, "hidden_channels": 8, "out_channels": 2, "heads": 2, "T": 2.0,
    "dropout": 0.3, "input_dropout": 0.2, "batch_norm": True, "label_channels": 2,
    "regularizers": ("kinetic", "jacobian"),
}  # fmt: skip
SMALL = Preset(
    split="public", hidden=8, heads=2, attention_channels=8, T=2.0, epochs=4, dropout=0.3,
    batch_norm=True, use_labels=True, jacobian=0.01,
)  # fmt: skip
MEASURED = ("seconds", "peak_memory_bytes")  # differ between equal runs


@pytest.fixture(autouse=True)
def small_and_eager(one_thread, monkeypatch):
    """Every epoch is saved."""
    monkeypatch.setattr(train, "STATE_SECONDS", 0.0)


def two_rings():
    ids = torch.arange(N)
    half = N // 2
    ring = ids // half * half + (ids + 1) % half
    edges = torch.cat([torch.stack([ids, ring]), torch.stack([ring, ids])], dim=1)
    y = ids // half
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)) + y[:, None]
    split = Split(ids[::6], ids[1::6], torch.cat([ids[k::6] for k in (2, 3, 4, 5)]))
    return NodeData("rings", x, y, edges, split)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "muon"])
def test_fit_goes_on_to_the_same_weights(optimizer, tmp_path):
    data = two_rings()
    graph = Graph.from_edge_index(data.edge_index, N)

    def fit(seed, **more):
        torch.manual_seed(seed)
        return train.fit(
            GRAND(**MODEL), data, graph, data.public_split, epochs=6, lr=0.05, optimizer=optimizer,
            use_labels=True, early_stop=1.5, penalties={"kinetic": 0.1, "jacobian": 0.01}, **more,
        )  # fmt: skip

    whole = fit(0)
    state = tmp_path / "state"
    for seed, last in ((0, 1), (1, 2), (2, 4)):  # other weights and random numbers each time

        def kill(index, epoch, last=last):
            if index == last:
                raise Killed

        with pytest.raises(Killed):
            fit(seed, state=state, on_epoch=kill)
        # The epoch that was under way is lost
        assert len(load_state(state)["history"]) == last
    told = []
    resumed = fit(3, state=state, on_epoch=lambda index, epoch: told.append(index))
    assert told == list(range(6))
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(w, whole.weights[name]) for name, w in resumed.weights.items())
    assert values(resumed) == values(whole)
    assert (resumed.best_epoch, resumed.test_accuracy) == (whole.best_epoch, whole.test_accuracy)


def values(run):
    return [(e.loss, e.val_loss, e.val_accuracy, e.nfe, e.nfe_backward, e.time)
            for e in run.history]  # fmt: skip


def test_a_state_of_another_model_is_refused(tmp_path):
    data = two_rings()
    graph = Graph.from_edge_index(data.edge_index, N)

    def fit(channels):
        model = GRAND(5, channels, 2)
        return train.fit(
            model, data, graph, data.public_split, epochs=1, lr=0.1, state=tmp_path / "state"
        )

    fit(8)
    with pytest.raises(ValueError, match="^fit: `state` must be that of this model"):
        fit(9)


def test_patience_counts_across_a_stop(tmp_path):
    data = two_rings()
    graph = Graph.from_edge_index(data.edge_index, N)

    def fit(epochs):
        torch.manual_seed(0)
        return train.fit(GRAND(5, 8, 2), data, graph, data.public_split, epochs=epochs, lr=0.2,
                         patience=4, state=tmp_path / "state")  # fmt: skip

    ended = len(fit(100).history)
    (tmp_path / "state").unlink()
    fit(ended - 2)
    assert len(fit(100).history) == ended
    assert len(fit(100).history) == ended  # and no further


def experiment(out, **more):
    own = two_rings()
    settings = {"seeds": 2, "device": torch.device("cpu"), "out": out, "data": own}
    return Experiment("rings", SMALL, **(settings | more))


def results_of(folder):
    """What two equal runs leave alike."""
    with open(folder / METRICS_FILE, newline="") as stream:
        rows = [{k: v for k, v in row.items() if k not in MEASURED}
                for row in csv.DictReader(stream)]  # fmt: skip
    return (folder / WEIGHTS_FILE).read_bytes(), (folder / "config.json").read_bytes(), rows


def silent(line):
    pass


def test_a_run_killed_at_any_write_goes_on_to_the_same_results(tmp_path, monkeypatch):
    """Before each file is written, half-way, before it gets its name, and after."""
    monkeypatch.setattr(plots, "draw_training_curves", lambda *args, **more: None)
    run_seeds(experiment(tmp_path / "whole"), silent)
    want = results_of(tmp_path / "whole")
    real, written, deadly = checkpoint.write_whole, 0, 0

    def write_whole(path, content):
        nonlocal written
        moment = deadly - 4 * written
        written += 1
        if moment == 0:
            raise Killed
        if moment in (1, 2):
            part = content if moment == 2 else content[: len(content) // 2]
            path.with_name(f"{path.name}.part").write_bytes(part)
            raise Killed
        real(path, content)
        if moment == 3:
            raise Killed

    for name in ("checkpoint", "run_folder", "metrics"):
        monkeypatch.setattr(f"grand_fast.{name}.write_whole", write_whole)
    kills = 0
    while True:
        folder = tmp_path / str(deadly)
        written = 0
        try:
            run_seeds(experiment(folder), silent)
        except Killed:
            kills += 1
        else:
            break
        deadly, written, now = 10**9, 0, deadly
        run_seeds(experiment(folder), silent)
        deadly = now + 1
        assert results_of(folder) == want, f"killed at moment {now}"
        assert {file.suffix for file in (folder / SEEDS_FOLDER).iterdir()} == {".json"}
    # The run's file, the metrics, a state an epoch and one at the end, the weights, the figures
    assert kills == 4 * written and written >= 2 + 2 * (4 + 1 + 1)
    assert results_of(folder) == want


def test_finished_seeds_are_not_trained_again(tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = run_seeds(experiment(out), silent)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lines = []
    with monkeypatch.context() as patched:
        patched.setattr(GRAND, "forward", None)
        again = run_seeds(experiment(out), lines.append)
    assert [values(run) for run in again.runs] == [values(run) for run in first.runs]
    assert [r.test_accuracy for r in again.runs] == [r.test_accuracy for r in first.runs]
    assert sum("(finished before)" in line for line in lines) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not list((out / SEEDS_FOLDER).glob("*.safetensors"))

    more = run_seeds(experiment(out, seeds=3), silent)
    assert len(more.runs) == 3
    rows = results_of(out)[2]
    assert [(row["seed"], row["epoch"]) for row in rows] == [
        (str(seed), str(epoch)) for seed in range(3) for epoch in range(4)
    ]


def test_metrics(tmp_path):
    results = run_seeds(experiment(tmp_path / "run"), silent)
    with open(tmp_path / "run" / METRICS_FILE, newline="") as stream:
        rows = list(csv.reader(stream))
    assert tuple(rows[0]) == COLUMNS
    epoch = results.runs[1].history[2]
    assert rows[1 + 4 + 2] == ["1", "2", *(str(value) for value in vars(epoch).values())]


def test_another_run_in_the_folder_is_not_touched(tmp_path):
    out = tmp_path / "run"
    run_seeds(experiment(out, seeds=1), silent)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = replace(experiment(out), preset=replace(SMALL, epochs=5, lr=0.02))
    with pytest.raises(BadOptionError) as error:
        run_seeds(other, silent)
    text = str(error.value)
    assert f"got {out}: epochs 4 there, 5 here; lr 0.01 there, 0.02 here. Choose another" in text
    assert "--restart" in text
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    run_seeds(replace(other, restart=True), silent)
    assert json.loads((out / RUN_FILE).read_text())["epochs"] == 5
    assert {row["epoch"] for row in results_of(out)[2]} == set("01234")


def test_weights_of_unknown_origin_are_not_overwritten(tmp_path):
    (tmp_path / WEIGHTS_FILE).touch()
    with pytest.raises(BadOptionError, match=f"it holds {WEIGHTS_FILE}"):
        run_seeds(experiment(tmp_path), silent)


def test_other_data_are_another_run(tmp_path):
    run_seeds(experiment(tmp_path, seeds=1), silent)
    own = two_rings()
    changed = replace(own, x=own.x + 1)
    with pytest.raises(BadOptionError, match="data [0-9a-f]{16} there, [0-9a-f]{16} here"):
        run_seeds(experiment(tmp_path, data=changed), silent)


COMMAND = """
import sys
import torch
from grand_fast import cli, train
torch.set_num_threads(1)
train.STATE_SECONDS = 0.0
sys.exit(cli.main(["train", "--data", "rings.npz", "--seeds", "2", "--epochs", "60", "--hidden",
                   "8", "--heads", "2", "--attention-channels", "8", "--T", "8", "--dropout",
                   "0.3", "--batch-norm", "--use-labels", "--out", sys.argv[1]]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_sigkill_at_random_moments(tmp_path):
    own = two_rings()
    split = own.public_split
    np.savez(tmp_path / "rings.npz", edge_index=own.edge_index, x=own.x, y=own.y,
             train=split.train, val=split.val, test=split.test)  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

    def start(out):
        return subprocess.Popen([sys.executable, "-c", COMMAND, out], cwd=tmp_path,
                                stdout=subprocess.DEVNULL, env=environment)  # fmt: skip

    assert start("whole").wait(timeout=120) == 0
    seeds = tmp_path / "killed" / SEEDS_FOLDER
    moments = random.Random(0)

    def progress():
        try:
            return {path: path.stat().st_mtime_ns for path in seeds.glob("*")}
        except FileNotFoundError:  # a file got its name, or went, just now
            return None

    for _ in range(3):
        before = progress()
        process = start("killed")
        while progress() == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(0.3 * moments.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert start("killed").wait(timeout=120) == 0
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")
