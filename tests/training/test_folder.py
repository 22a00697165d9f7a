"""The folder of a run: what it holds, and what is done about what it holds already."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from grand_fast.nn import GRAND
from grand_fast.training.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from grand_fast.training.folder import CURVES_FILE, LOCK_FILE, RUN_FILE, SEEDS_FOLDER, RunFolder
from grand_fast.training.history import COLUMNS, METRICS_FILE, TENSORBOARD_FOLDER, Epoch, Metrics
from grand_fast.training.option_types import BadOptionError
from grand_fast.training.options import flag_of
from grand_fast.training.run import run_seeds
from grand_fast.training.trainer import Fit
from tests._small_run import SMALL, experiment, results_of, silent, two_rings, values

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


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
        (str(seed), str(epoch)) for seed in range(3) for epoch in range(2)
    ]


def test_metrics(tmp_path):
    results = run_seeds(experiment(tmp_path / "run"), silent)
    with open(tmp_path / "run" / METRICS_FILE, newline="") as stream:
        rows = list(csv.reader(stream))
    assert tuple(rows[0]) == COLUMNS
    epoch = results.runs[1].history[1]
    assert rows[1 + 2 + 1] == ["1", "1", *(str(value) for value in vars(epoch).values())]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = run_seeds(experiment(tmp_path / "run"), silent)
    for seed, run in enumerate(results.runs):
        events = EventAccumulator(str(tmp_path / "run" / TENSORBOARD_FOLDER / f"seed-{seed}"))
        events.Reload()
        assert set(events.Tags()["scalars"]) == set(COLUMNS) - {"seed", "epoch"}
        losses = [(event.step, event.value) for event in events.Scalars("val_loss")]
        assert losses == [(i, pytest.approx(e.val_loss)) for i, e in enumerate(run.history)]


def test_tensorboard_forgets_what_a_killed_run_wrote(tmp_path, monkeypatch):
    """With a writer of our own in the place of TensorBoard's."""
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, "from", purge_step))

        def add_scalar(self, name, value, step):
            if name == "loss":
                written.append(step)

        def close(self):
            written.append("closed")

    module = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    metrics = Metrics(tmp_path)
    epoch = Epoch(1.0, 1.0, 0.5, 4, 4, 0.1, 2**20, 1.0)
    for seed, index in ((0, 0), (0, 1), (1, 0)):
        metrics.add(seed, index, epoch)
    metrics.close()
    assert written == [("seed-0", "from", 0), 0, 1, "closed", ("seed-1", "from", 0), 0, "closed"]


def test_another_run_in_the_folder_is_not_touched(tmp_path):
    out = tmp_path / "run"
    run_seeds(experiment(out, seeds=1), silent)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = replace(experiment(out), preset=replace(SMALL, epochs=3, lr=0.02))
    with pytest.raises(BadOptionError) as error:
        run_seeds(other, silent)
    text = str(error.value)
    assert f"got {out}: epochs 2 there, 3 here; lr 0.01 there, 0.02 here. Choose another" in text
    assert text.startswith("`out` must be") and "or `restart`, which deletes" in text
    assert "or --restart, which" in error.value.phrased(flag_of)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    run_seeds(replace(other, restart=True), silent)
    assert json.loads((out / RUN_FILE).read_text())["epochs"] == 3
    assert {row["epoch"] for row in results_of(out)[2]} == set("012")


def test_another_run_that_came_in_the_meantime_is_not_touched(tmp_path):
    late, first = (RunFolder(tmp_path, {"lr": lr}) for lr in (0.1, 0.2))
    first.begin()
    first.close()
    with pytest.raises(BadOptionError, match="lr 0.2 there, 0.1 here"):
        late.begin()
    late.close()
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {"lr": 0.2}


def test_adjoints_of_one_gradient_are_one_run(tmp_path):
    first = RunFolder(tmp_path, {"lr": 0.1, "adjoint": "checkpoint"})
    first.begin()
    first.close()
    RunFolder(tmp_path, {"lr": 0.1, "adjoint": "auto"}).close()
    for other in ({"lr": 0.2, "adjoint": "auto"}, {"lr": 0.1, "adjoint": "continuous"}):
        with pytest.raises(BadOptionError):
            RunFolder(tmp_path, other)


def test_weights_of_unknown_origin_are_not_overwritten(tmp_path):
    (tmp_path / WEIGHTS_FILE).touch()
    with pytest.raises(BadOptionError, match=f"it holds {WEIGHTS_FILE}"):
        run_seeds(experiment(tmp_path), silent)


def test_two_processes_do_not_share_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    run_seeds(experiment(out, seeds=1), silent)
    script = f"import fcntl; f = open({str(out / LOCK_FILE)!r}, 'w'); fcntl.flock(f, 2); "
    script += "print('locked', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert other.stdout.readline() == "locked\n"
    for restart in (False, True):
        with pytest.raises(BadOptionError, match=f"no other process trains, got {out}"):
            run_seeds(experiment(out, seeds=2, restart=restart), silent)
    other.kill()
    other.communicate()
    assert len(run_seeds(experiment(out, seeds=2), silent).runs) == 2


@pytest.mark.parametrize("file", ["0.json", "0.safetensors"])
def test_a_damaged_file_is_named(tmp_path, file):
    out = tmp_path / "run"
    run_seeds(experiment(out, seeds=1), silent)
    whole = results_of(out)
    (out / SEEDS_FOLDER / "0.json").unlink()
    (out / SEEDS_FOLDER / file).write_text("{")
    with pytest.raises(BadOptionError, match=f"got {out / SEEDS_FOLDER / file}.*[Dd]elete"):
        run_seeds(experiment(out, seeds=1), silent)
    lines = []
    run_seeds(experiment(out, seeds=1, restart=True), lines.append)
    assert not any("goes on" in line for line in lines)
    assert results_of(out) == whole


def test_other_data_are_another_run(tmp_path):
    run_seeds(experiment(tmp_path, seeds=1), silent)
    own = two_rings()
    changed = replace(own, x=own.x + 1)
    with pytest.raises(BadOptionError, match="data [0-9a-f]{16} there, [0-9a-f]{16} here"):
        run_seeds(experiment(tmp_path, data=changed), silent)


def test_what_an_interrupt_left_does_not_stay(tmp_path, monkeypatch):
    """By loss: seed 1 ends with a worse accuracy than that of its best epoch when interrupted."""
    told = {}

    def fit(model, *args, on_epoch, label, **more):
        loss, accuracy, stopped = told[label]
        epoch = Epoch(1.0, loss, accuracy, 4, 4, 0.1, 2**20, 1.0)
        on_epoch(0, epoch)
        return Fit([epoch], 0, None, model.state_dict(), accuracy, stopped)

    monkeypatch.setattr("grand_fast.training.run.fit", fit)
    given = experiment(tmp_path / "run", preset=replace(SMALL, select="loss"))
    told["seed 0"] = (0.5, 0.8, None)
    for told["seed 1"] in ((0.6, 0.9, "interrupted"), (0.55, 0.7, None)):
        run_seeds(given, silent)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0

    told["seed 2"] = (0.4, 0.6, None)
    results = run_seeds(replace(given, seeds=3), silent)
    assert results.saved_seed == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 2


def saved_seed(folder):
    return json.loads((folder / CONFIG_FILE).read_text())["seed"]


@pytest.fixture
def told(monkeypatch):
    """Validation accuracies that trainings reach, by seed, and the seeds that were trained."""
    reached, trained = {}, []

    def fit(model, *args, on_epoch, label, **more):
        seed = int(label.removeprefix("seed "))
        trained.append(seed)
        accuracy, stopped = reached[seed]
        epoch = Epoch(1.0, 0.5, accuracy, 4, 4, 0.1, 2**20, 1.0)
        on_epoch(0, epoch)
        weights = {"seed": torch.tensor(seed)}
        return Fit([epoch], 0, None, weights, accuracy, stopped)

    monkeypatch.setattr("grand_fast.training.run.fit", fit)
    return reached, trained


def seed_in_weights(folder):
    return int(load_file(folder / WEIGHTS_FILE)["seed"])


def seeds_in_metrics(folder):
    return [row["seed"] for row in results_of(folder)[2]]


@pytest.mark.parametrize("gone", ["deleted", "cut", "configuration"])
def test_weights_that_are_gone_are_trained_again(tmp_path, told, gone):
    reached, trained = told
    reached |= {0: (0.5, None), 1: (0.9, None), 2: (0.9, None)}
    run_seeds(experiment(tmp_path, seeds=3), silent)
    want = results_of(tmp_path)
    trained.clear()
    path = tmp_path / (CONFIG_FILE if gone == "configuration" else WEIGHTS_FILE)
    if gone == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    lines = []
    results = run_seeds(experiment(tmp_path, seeds=3), lines.append)
    assert trained == [1] and results.saved_seed == 1
    assert f"seed 1: its weights are gone from {tmp_path}; it is trained again" in lines
    assert ["(finished before)" in line for line in lines[-3:]] == [True, False, True]
    assert results_of(tmp_path) == want
    assert [run.test_accuracy for run in results.runs] == [0.5, 0.9, 0.9]
    run_seeds(experiment(tmp_path, seeds=3), silent)
    assert trained == [1]


def test_fewer_seeds_than_before(tmp_path, told):
    """The weights that are there are those of the best of all, and said to be so."""
    reached, trained = told
    reached |= {0: (0.5, None), 1: (0.9, None)}
    run_seeds(experiment(tmp_path), silent)
    before = results_of(tmp_path)
    results = run_seeds(experiment(tmp_path, seeds=1), silent)
    assert trained == [0, 1] and len(results.runs) == 1
    assert results.saved_seed == 1 == seed_in_weights(tmp_path)
    assert results_of(tmp_path) == before

    (tmp_path / WEIGHTS_FILE).unlink()  # now the best of those asked for
    results = run_seeds(experiment(tmp_path, seeds=1), silent)
    assert trained == [0, 1, 0]
    assert results.saved_seed == 0 == seed_in_weights(tmp_path) == saved_seed(tmp_path)
    assert seeds_in_metrics(tmp_path) == ["0", "1"]

    results = run_seeds(experiment(tmp_path), silent)  # and again of all
    assert trained == [0, 1, 0, 1]
    assert results.saved_seed == 1 == seed_in_weights(tmp_path) == saved_seed(tmp_path)
    assert seeds_in_metrics(tmp_path) == ["0", "1"]


def test_a_seed_trained_again_does_not_replace_better_weights(tmp_path, told):
    reached, trained = told
    reached |= {0: (0.5, None), 1: (0.9, None)}
    run_seeds(experiment(tmp_path), silent)
    (tmp_path / SEEDS_FOLDER / "0.json").unlink()
    for seeds in (1, 2):
        results = run_seeds(experiment(tmp_path, seeds=seeds), silent)
        assert results.saved_seed == 1 == seed_in_weights(tmp_path)
        assert sorted(seeds_in_metrics(tmp_path)) == ["0", "1"]
    assert trained == [0, 1, 0]


def test_the_weights_of_an_interrupted_seed_are_not_said_to_be_another_s(tmp_path, told):
    reached, trained = told
    reached |= {0: (0.5, None), 1: (0.9, "interrupted")}
    assert run_seeds(experiment(tmp_path), silent).saved_seed == 1
    results = run_seeds(experiment(tmp_path, seeds=1), silent)
    assert trained == [0, 1] and results.saved_seed == 1 == seed_in_weights(tmp_path)
    reached[1] = (0.95, None)
    assert run_seeds(experiment(tmp_path), silent).saved_seed == 1
    assert trained == [0, 1, 1]
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["val_accuracy"] == 0.95


def test_tables_and_pictures_that_are_gone_are_made_again(tmp_path, told):
    reached, trained = told
    reached |= {0: (0.5, None), 1: (0.9, None)}
    run_seeds(experiment(tmp_path), silent)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name in (METRICS_FILE, CURVES_FILE):
        (tmp_path / name).unlink()
    run_seeds(experiment(tmp_path), silent)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert trained == [0, 1]


def test_a_restart_forgets_what_was_there(tmp_path, told):
    reached, trained = told
    reached |= {0: (0.5, None), 1: (0.9, None)}
    run_seeds(experiment(tmp_path), silent)
    results = run_seeds(experiment(tmp_path, seeds=1, restart=True), silent)
    assert results.saved_seed == 0 == seed_in_weights(tmp_path)
    assert seeds_in_metrics(tmp_path) == ["0"]
