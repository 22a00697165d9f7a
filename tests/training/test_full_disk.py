"""No room for what is written: the file is named, nothing half-written stays, the run goes on."""

import errno
import json
import os
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from grand_fast import cli
from grand_fast.training import checkpoint
from grand_fast.training.checkpoint import (
    WEIGHTS_FILE,
    WriteError,
    save_checkpoint,
    save_state,
    write_file,
    write_whole,
)
from grand_fast.training.experiment import write_summary
from grand_fast.training.folder import draw_training_curves
from grand_fast.training.history import METRICS_FILE, Epoch, Metrics
from grand_fast.training.run import run_seeds
from grand_fast.training.trainer import Fit
from tests._command_line import QUICK, fails, own_folder  # noqa: F401  # a fixture
from tests._small_run import experiment, results_of, silent

resource = pytest.importorskip("resource")  # not on Windows

EPOCH = Epoch(1.0, 1.0, 0.5, 4, 4, 0.1, 2**20, 1.0)
FIT = Fit([EPOCH], 0, None, {}, 0.5)


@contextmanager
def room(size):
    """No file may grow beyond `size` bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_epochs(metrics):
    for index in range(20):
        metrics.add(0, index, EPOCH)


WRITERS = {
    "file": lambda folder: write_whole(folder / "file", bytes(100)),
    "f.json": lambda folder: write_file(folder / "f.json", bytes(100)),
    "config.json": lambda folder: save_checkpoint(folder, {}, {"model": "of some size" * 9}),
    WEIGHTS_FILE: lambda folder: save_checkpoint(folder, {"w": torch.zeros(99)}, {}),
    "state": lambda folder: save_state(folder / "state", torch.zeros(99)),
    "summary.json": lambda folder: write_summary(folder / "summary.json", {"a": [0] * 99}),
    "curves.png": lambda folder: draw_training_curves(FIT, folder / "curves.png", title="t"),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache_of_matplotlib(tmp_path_factory):
    """It is written when the first picture is drawn."""
    draw_training_curves(FIT, tmp_path_factory.mktemp("drawn") / "once.png", title="")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a run left alone."""
    folder, threads = tmp_path_factory.mktemp("whole"), torch.get_num_threads()
    torch.set_num_threads(1)  # the rounding of sums depends on it
    run_seeds(experiment(folder), silent)
    torch.set_num_threads(threads)
    return results_of(folder)


@pytest.mark.parametrize("size", [2, 50])
@pytest.mark.parametrize("name", WRITERS)
def test_the_file_is_named_and_stays_as_it_was(tmp_path, name, size):
    (tmp_path / name).write_bytes(b"old")
    before = files(tmp_path)
    with room(size), pytest.raises(WriteError) as error:
        WRITERS[name](tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name} cannot be written: File too large. ")
    after = files(tmp_path)
    assert after.pop(tmp_path / name) == b"old"
    assert set(after) - set(before) <= {tmp_path / "config.json"}  # which is whole


def test_metrics(tmp_path):
    metrics = Metrics(tmp_path)
    for write in (lambda: add_epochs(metrics), metrics.close):  # what is left fails once more
        with room(300), pytest.raises(WriteError) as error:
            write()
        assert str(error.value).startswith(f"{tmp_path / METRICS_FILE} cannot be written: ")
    with closing(Metrics(tmp_path)) as metrics:
        add_epochs(metrics)
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 21


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Make room there."), (errno.EDQUOT, "Make room there."),
     (errno.EROFS, "Choose a place that can be written."),
     (errno.EACCES, "Choose a place that can be written.")],
)  # fmt: skip
def test_the_remedy(tmp_path, monkeypatch, number, remedy):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint.os, "replace", refuse)
    with pytest.raises(WriteError) as error:
        write_whole(tmp_path / "file", b"new")
    reason = os.strerror(number)
    assert str(error.value) == f"{tmp_path / 'file'} cannot be written: {reason}. {remedy}"
    assert error.value.errno == number
    assert files(tmp_path) == {}


def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"new")
    assert files(tmp_path) == {}


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"


def test_a_device_stays_one():
    write_file(Path(os.devnull), b"new")
    assert Path(os.devnull).is_char_device()


@pytest.mark.usefixtures("one_thread", "pictures")
@pytest.mark.parametrize("size", [0, 1_000, 5_000, 50_000])
def test_a_run_goes_on_once_there_is_room(tmp_path, whole, size):
    out = tmp_path / "run"
    with room(size), pytest.raises(WriteError, match=f"^{out}/.* cannot be written"):
        run_seeds(experiment(out), silent)
    assert not [path for path in out.rglob("*") if path.suffix == ".part"]
    run_seeds(experiment(out), silent)
    assert results_of(out) == whole


def test_the_command_says_what_to_do(capsys):
    with room(2_000):
        line = fails(capsys, ["train", *QUICK], 1)
    assert line.startswith("grand-fast: runs/digits-nl/")
    assert line.endswith(
        " cannot be written: File too large. Choose a place that can be written. A run that was "
        "begun goes on when the same command is given again.\n"
    )
    capsys.readouterr()
    assert cli.main(["train", *QUICK, "--json", "summary.json"]) == 0
    assert json.loads(Path("summary.json").read_text())["dataset"] == "digits"
