"""A run that was stopped, at any moment and in any way, ends with the weights of one left alone."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from grand_fast import cli
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.training import checkpoint, loop
from grand_fast.training.checkpoint import load_state
from grand_fast.training.folder import SEEDS_FOLDER
from grand_fast.training.run import run_seeds
from grand_fast.training.trainer import OPTIMIZERS
from tests._small_run import N, experiment, results_of, silent, two_rings, values

MODEL = {
    "in_channels": 5, "hidden_channels": 8, "out_channels": 2, "heads": 2, "T": 2.0,
    "dropout": 0.3, "input_dropout": 0.2, "batch_norm": True, "label_channels": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_and_eager(one_thread, no_pictures, monkeypatch):
    """Every epoch is saved."""
    monkeypatch.setattr(loop, "STATE_SHARE", math.inf)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "muon"])
def test_fit_goes_on_to_the_same_weights(optimizer, tmp_path):
    data = two_rings()
    graph = Graph.from_edge_index(data.edge_index, N)
    # The Jacobian draws random numbers of its own, and is slow
    penalty = "jacobian" if optimizer == "adam" else "kinetic"

    def fit(seed, **more):
        torch.manual_seed(seed)
        return loop.fit(
            GRAND(**MODEL, regularizers=(penalty,)), data, graph, data.public_split, epochs=5,
            lr=0.05, optimizer=optimizer,
            use_labels=True, early_stop=1.5, penalties={penalty: 0.1}, entropy=0.5,
            entropy_warmup=4, **more,
        )  # fmt: skip

    whole = fit(0)
    state = tmp_path / "state"
    twice = optimizer == "adam"
    for seed, last in ((0, 1), (1, 3))[: 1 + twice]:  # other weights and random numbers each time

        def kill(index, epoch, last=last):
            if index == last:
                raise Killed

        with pytest.raises(Killed):
            fit(seed, state=state, on_epoch=kill)
        # The epoch that was under way is lost
        assert len(load_state(state)["history"]) == last
    told = []
    resumed = fit(3, state=state, on_epoch=lambda index, epoch: told.append(index))
    assert told == list(range(5))
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(w, whole.weights[name]) for name, w in resumed.weights.items())
    assert values(resumed) == values(whole)
    assert (resumed.best_epoch, resumed.test_accuracy) == (whole.best_epoch, whole.test_accuracy)


def test_a_state_of_another_model_is_refused(tmp_path):
    data = two_rings()
    graph = Graph.from_edge_index(data.edge_index, N)

    def fit(channels):
        model = GRAND(5, channels, 2)
        return loop.fit(
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
        return loop.fit(GRAND(5, 8, 2), data, graph, data.public_split, epochs=epochs, lr=0.2,
                         patience=4, state=tmp_path / "state")  # fmt: skip

    ended = len(fit(100).history)
    (tmp_path / "state").unlink()
    fit(ended - 2)
    assert len(fit(100).history) == ended
    assert len(fit(100).history) == ended  # and no further


def test_a_run_killed_at_any_write_goes_on_to_the_same_results(tmp_path, monkeypatch):
    """Half-way or, every other one, before it gets its name; and after. And before it is written,
    if the folder is not the same then as after the write before."""
    real, folder = checkpoint.write_whole, tmp_path / "whole"
    moments, left, written, deadly = [], None, 0, None

    def files():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def note(path, content):
        nonlocal left, written
        moments.extend((written, name) for name in (("half", "whole")[written % 2], "after"))
        if files() != left:
            moments.append((written, "before"))
        real(path, content)
        written, left = written + 1, files()

    def kill(path, content):
        nonlocal written
        moment = deadly[1] if written == deadly[0] else None
        written += 1
        if moment in ("half", "whole"):
            part = content if moment == "whole" else content[: len(content) // 2]
            path.with_name(f"{path.name}.part").write_bytes(part)
        elif moment != "before":
            real(path, content)
        if moment is not None:
            raise Killed

    def write_by(function):
        for name in ("checkpoint", "folder", "history"):
            monkeypatch.setattr(f"grand_fast.training.{name}.write_whole", function)

    write_by(note)
    run_seeds(experiment(folder), silent)
    want = results_of(folder)
    # The run's file, the metrics; a state an epoch and one at the end, the figures; the weights
    assert written >= 2 + 2 * (2 + 1 + 1) + 2
    for number, deadly in enumerate(moments):
        folder, written = tmp_path / str(number), 0
        write_by(kill)
        with pytest.raises(Killed):
            run_seeds(experiment(folder), silent)
        write_by(real)
        run_seeds(experiment(folder), silent)
        assert results_of(folder) == want, f"killed at {deadly}"
        assert {file.suffix for file in (folder / SEEDS_FOLDER).iterdir()} == {".json"}


COMMAND = """
import sys
import torch
from grand_fast import cli
from grand_fast.training import loop
torch.set_num_threads(1)
loop.STATE_SHARE = float("inf")
sys.exit(cli.main(sys.argv[1:]))
"""
ARGUMENTS = ["train", "--data", "rings.npz", "--seeds", "2", "--epochs", "30", "--hidden", "8",
             "--heads", "2", "--attention-channels", "8", "--T", "4", "--dropout", "0.3",
             "--batch-norm", "--use-labels", "--out"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_sigkill_at_random_moments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = two_rings()
    split = own.public_split
    np.savez("rings.npz", edge_index=own.edge_index, x=own.x, y=own.y,
             train=split.train, val=split.val, test=split.test)  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    assert cli.main([*ARGUMENTS, "whole"]) == 0
    seeds = tmp_path / "killed" / SEEDS_FOLDER
    moments = random.Random(0)

    def progress():
        try:
            return {path: path.stat().st_mtime_ns for path in seeds.glob("*")}
        except FileNotFoundError:  # a file got its name, or went, just now
            return None

    for _ in range(2):
        before = progress()
        process = subprocess.Popen([sys.executable, "-c", COMMAND, *ARGUMENTS, "killed"],
                                   stdout=subprocess.DEVNULL, env=environment)  # fmt: skip
        while progress() == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(0.2 * moments.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert cli.main([*ARGUMENTS, "killed"]) == 0
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")
