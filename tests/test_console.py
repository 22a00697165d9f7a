"""What is printed survives every encoding, and a reader or a disk that takes no more."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grand_fast import cli
from tests._command_line import QUICK, own_folder  # noqa: F401  # a fixture

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


class Stream(io.TextIOWrapper):
    """Standard output of an encoding."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def closed_pipe():
    """A stream whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:  # closes it: of what is left, nothing may fail now
        yield stream


@pytest.mark.parametrize(
    ("encoding", "options", "sign"),
    [("ascii", [], "+-"), ("ascii", ["--json"], "+-"), ("utf-8", [], "±"), ("koi8-r", [], "+-")],
    ids=["ascii", "ascii-json", "utf-8", "koi8-r"],
)
def test_training(monkeypatch, tmp_path, encoding, options, sign):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Stream(encoding))
    command = ["train", *QUICK, "--out", str(tmp_path / "a–é"), *options]
    assert cli.main(command) == 0
    lines = (sys.stderr if options else sys.stdout).text()
    assert f" {sign} 0.0000 (1 seed); label spreading" in lines
    assert "a-\\xe9/curves.png" in lines or encoding != "ascii"
    if options:
        assert json.loads(sys.stdout.text())["std"] == 0.0


def test_names_that_no_encoding_has(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream("utf-8"))
    assert cli.main(["train", "--data", os.fsdecode(b"\xff.npz")]) == 1
    assert sys.stderr.text().startswith("grand-fast: \\udcff.npz: no such file")


@pytest.mark.parametrize("command", [["info"], ["--version"]])
def test_a_closed_pipe_ends_quietly(capfd, closed_pipe, monkeypatch, command):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert cli.main(command) == 141
    assert capfd.readouterr().err == ""


def test_training_into_a_closed_pipe_goes_on_when_called_again(capfd, closed_pipe, monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert cli.main(["train", *QUICK]) == 141
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", Stream("utf-8"))
    assert cli.main(["train", *QUICK]) == 0


def test_head(tmp_path):
    """The whole process, whose end flushes what is left."""
    process = subprocess.Popen([sys.executable, "-m", "grand_fast", "info"], env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("command", [["info"], ["train", *QUICK]])
def test_no_room_for_the_output(capfd, monkeypatch, command):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(command) == 1
    err = capfd.readouterr().err
    assert err.startswith("grand-fast: the output cannot be written: No space left on device.")
    assert err.count("\n") == 1


def test_without_any_output(monkeypatch):
    """As a process that is started with it closed."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == 0


def test_the_benchmarks_too(closed_pipe, capfd, monkeypatch):
    def run(options, report):
        print("±")

    bench = pytest.importorskip("bench.__main__")
    monkeypatch.setattr(bench, "import_module", lambda path: SimpleNamespace(run=run, EPILOG=""))
    stream = Stream("ascii")
    for stdout, code in ((stream, 0), (closed_pipe, 141)):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert bench.main(["memory"]) == code
    assert "+-\n" in stream.text()
    assert capfd.readouterr().err == ""
