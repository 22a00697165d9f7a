"""The command line: what it prints and writes, its exit codes, and one line for each user error."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from grand_fast import cli
from grand_fast.data.datasets import DATASETS, load
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.training import loop
from grand_fast.training.checkpoint import load_checkpoint
from grand_fast.training.presets import OPTIONS
from tests._command_line import QUICK, fails, own_folder  # noqa: F401  # a fixture

ROOT = os.environ.get("GRAND_FAST_DATA")
KEYS = {
    "dataset", "variant", "method", "seeds", "test_accuracy", "mean", "std", "seconds_per_epoch",
    "nfe_forward", "peak_memory_bytes", "parameters", "versions",
}  # fmt: skip


@pytest.mark.usefixtures("pictures")
def test_train_writes_everything(capsys, tmp_path):
    summary = tmp_path / "results" / "digits.json"
    assert cli.main(["train", *QUICK, "--seeds", "2", "--json", str(summary)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "1,797 nodes" in out and "label spreading on the same graph and labels: 0.9" in out
    folder = Path("runs/digits-nl")
    assert str(folder / "curves.png") in out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    content = json.loads(summary.read_text())
    assert set(content) >= KEYS
    assert (content["dataset"], content["variant"], content["method"]) == ("digits", "nl", "rk4")
    assert content["seeds"] == len(content["test_accuracy"]) == 2
    assert content["mean"] == pytest.approx(sum(content["test_accuracy"]) / 2)
    assert 0 <= content["std"] < 0.5
    assert content["nfe_forward"] == 4
    assert content["peak_memory_bytes"] > 2**20 and content["seconds_per_epoch"] > 0
    assert content["versions"]["torch"] == version("torch")
    assert len(content["label_spreading"]["test_accuracy"]) == 2

    config = json.loads((folder / "config.json").read_text())
    model = load_checkpoint(folder)
    assert sum(p.numel() for p in model.parameters()) == content["parameters"]
    digits = load("digits")
    graph = Graph.from_edge_index(digits.edge_index, 1797, self_loops=1.0)
    logits = model(digits.x, graph)
    assert logits.shape == (1797, 10)
    assert max(content["val_accuracy"]) == config["val_accuracy"]
    assert config["test_accuracy"] == content["test_accuracy"][config["seed"]]


def test_json_alone_on_standard_output(capsys):
    options = ["--variant", "laplacian", "--method", "euler", "--out", "here"]
    assert cli.main(["train", *QUICK, *options, "--json"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert (content["variant"], content["method"]) == ("laplacian", "euler")
    assert "test accuracy" in err and Path("here/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "says", "nfe"),
    [
        (["--method", "dopri5", "--tol-scale", "1e4"], "dopri5 with tol_scale = 10000 to T = 1", 1),
        (["--method", "bosh3", "--rtol", "0.1", "--atol", "0.1", "--adjoint", "continuous",
          "--tol-scale-adjoint", "1e6"], "bosh3 with rtol = 0.1 and atol = 0.1 to T = 1", 1),
        (["--method", "adaptive_heun"], "adaptive_heun with default tolerances", 1),
        (["--step-size", "0.125", "--memory-limit", "17000000"], "rk4 with steps of 0.125", 32),
        (["--method", "semi_implicit_euler"], "semi_implicit_euler with steps of 2", 1),
        (["--method", "implicit_adams", "--step-size", "0.25", "--rtol", "0.01"], "implicit", 1),
        (["--method", "uniformisation", "--variant", "l"], "uniformisation", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_solver_options(capsys, options, says, nfe):
    assert cli.main(["train", *QUICK, *options, "--json"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert says in err
    runs_again = "--adjoint" in options or "--memory-limit" in options
    assert content["nfe_forward"] >= nfe and content["nfe_backward"] >= runs_again
    assert isinstance(load_checkpoint(f"runs/digits-{content['variant']}"), GRAND)


def test_no_command(capsys):
    assert "COMMAND" in fails(capsys, [], 2)
    assert "invalid choice: 'trian'" in fails(capsys, ["trian"], 2)


def test_missing_data(capsys, tmp_path):
    line = fails(capsys, ["train", "--dataset", "cora", "--root", str(tmp_path)], 1)
    assert f"missing file {tmp_path}/planetoid/Cora/raw/ind.cora.x" in line
    assert "Planetoid(" in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_unwritable_results_are_said_before_training(capsys, option):
    Path("file").touch()
    line = fails(capsys, ["train", option, "file/below"], 1)
    assert f"{option} must be a place that can be written, got file" in line


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions bind no super-user")
def test_read_only_folder(capsys):
    Path("fixed").mkdir(mode=0o555)
    assert "Permission denied" in fails(capsys, ["train", "--out", "fixed/results"], 1)


def test_json_must_be_a_file(capsys):
    Path("folder").mkdir()
    assert "--json must be a file" in fails(capsys, ["train", "--json", "folder"], 1)


def test_a_model_larger_than_memory(capsys):
    line = fails(capsys, ["train", "--hidden", str(10**13)], 1)
    assert "can't allocate memory: you tried to allocate" in line and "smaller sizes" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "torch sees no GPU" in fails(capsys, ["train", "--device", "cuda"], 1)
    line = fails(capsys, ["train", "--backend", "gpu"], 1)
    assert "torch sees no GPU" in line
    assert "'auto' uses 'cpu'" in line


def test_backend_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("GRAND_FAST_BACKEND", "tpu")
    assert "GRAND_FAST_BACKEND must be one of auto, gpu" in fails(capsys, ["train"], 1)


def interrupt_after(monkeypatch, passes):
    """Ctrl-C in a forward pass; training and evaluation take turns."""
    forward = GRAND.forward
    left = passes

    def interrupted(self, *arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(GRAND, "forward", interrupted)


def test_interrupt_leaves_the_best_weights(capsys, monkeypatch):
    interrupt_after(monkeypatch, 3)
    assert cli.main(["train", *QUICK, "--json", "summary.json"]) == 130
    out, err = capsys.readouterr()
    assert err == (
        "grand-fast: interrupted. The best weights so far are in runs/digits-nl; load them with "
        "grand_fast.checkpoint.load_checkpoint, or give the same command to go on.\n"
    )
    assert not Path("summary.json").exists()
    folder = Path("runs/digits-nl").resolve()
    monkeypatch.undo()  # the working directory too
    assert isinstance(load_checkpoint(folder), GRAND)


def test_an_interrupted_restart_goes_on_without_it(capsys, monkeypatch):
    interrupt_after(monkeypatch, 3)
    line = fails(capsys, ["train", *QUICK, "--restart"], 130)
    assert line.endswith("or give the same command without --restart to go on.\n")


def test_interrupt_before_there_are_weights(capsys, monkeypatch):
    interrupt_after(monkeypatch, 0)
    assert "Nothing was saved" in fails(capsys, ["train", *QUICK], 130)


def test_the_same_command_again(capsys):
    assert cli.main(["train", *QUICK, "--seeds", "2"]) == 0
    first = capsys.readouterr().out
    assert cli.main(["train", *QUICK, "--seeds", "2"]) == 0
    again = capsys.readouterr().out
    assert again.count("(finished before)") == 2
    assert again.replace(" (finished before)", "") == first
    assert cli.main(["train", *QUICK, "--seeds", "2", "--restart"]) == 0
    assert "(finished before)" not in capsys.readouterr().out
    assert [path.name for path in Path("runs").iterdir()] == ["digits-nl"]


def test_fewer_seeds_than_before(capsys):
    """The weights in the folder are another seed's than the figures."""
    assert cli.main(["train", *QUICK, "--seeds", "2"]) == 0
    two = capsys.readouterr().out
    weights = "weights: runs/digits-nl/model.safetensors (with config.json, of seed 1"
    assert f"{weights})\n" in two
    assert cli.main(["train", *QUICK]) == 0
    one = capsys.readouterr().out
    assert "(1 seed)" in one
    more = ", which an earlier command with more seeds trained: better in validation"
    assert f"{weights}{more})\n" in one


def test_weights_that_are_gone(capsys):
    assert cli.main(["train", *QUICK]) == 0
    path = Path("runs/digits-nl/model.safetensors")
    weights = path.read_bytes()
    path.unlink()
    capsys.readouterr()
    assert cli.main(["train", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "seed 0: its weights are gone from runs/digits-nl; it is trained again\n" in out
    assert "(finished before)" not in out and path.read_bytes() == weights


def test_another_run_gets_a_folder_of_its_own(capsys):
    assert cli.main(["train", *QUICK]) == 0
    assert cli.main(["train", *QUICK, "--lr", "0.02"]) == 0
    assert cli.main(["train", *QUICK, "--lr", "0.02"]) == 0
    out = capsys.readouterr().out
    assert "runs/digits-nl/curves.png" in out and out.count("runs/digits-nl-2/curves.png") == 2
    line = fails(capsys, ["train", *QUICK, "--out", "runs/digits-nl-2"], 2)
    assert "got runs/digits-nl-2: lr 0.02 there, 0.03 here. Choose another, or --restart" in line


def test_an_interrupted_run_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(loop, "STATE_SHARE", float("inf"))
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        assert cli.main(["train", *QUICK]) == 130
    capsys.readouterr()
    assert cli.main(["train", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "seed 0: goes on from runs/digits-nl/seeds/0.safetensors" in out
    assert cli.main(["train", *QUICK, "--out", "whole"]) == 0
    whole, resumed = (
        Path(f, "model.safetensors").read_bytes() for f in ("whole", "runs/digits-nl")
    )
    assert whole == resumed


def test_failed_solve(capsys):
    arguments = ["train", *QUICK, "--method", "euler", "--T", "8000", "--step-size", "80"]
    line = fails(capsys, arguments, 1)
    assert "seed 0, epoch 0: NON_FINITE at t = 8000" in line and "try a smaller step_size" in line


def test_help_teaches(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "grand-fast train --dataset Cora --root" in out
    assert all(name in out for name in DATASETS)
    for name in OPTIONS:
        assert f"--{name.replace('_', '-')}" in out or f"[no-]{name}" in out
    assert cli.main(["--help"]) == 0
    assert "train" in capsys.readouterr().out


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("processor", "threads", "memory", "backends", "reference        ready"):
        assert word in out
    assert f"torch            {torch.__version__.partition('+')[0]}" in out
    assert "missing file data/planetoid/Cora/raw/ind.cora.x" in out
    assert "missing file data/ogb/ogbn_arxiv/raw/edge.csv.gz" in out
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        assert "gpu              unavailable" in out


def test_bench_without_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "grand_fast" / "cli.py"))
    assert "`python -m bench`" in fails(capsys, ["bench", "ops", "--json", "x"], 1)


def test_bench_passes_its_arguments_on(monkeypatch, tmp_path):
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "__init__.py").touch()
    (bench / "__main__.py").write_text("import sys; sys.exit(len(sys.argv) - 1)")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "grand_fast" / "cli.py"))
    assert cli.main(["bench", "ops", "--help", "-x"]) == 3


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "grand_fast", "--version"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (run.returncode, run.stdout.split()[0]) == (0, "grand-fast")


@pytest.mark.slow
def test_digits_reach_their_accuracy(capsys):
    """Long before the epochs of their configuration are over."""
    assert cli.main(["train", "--seeds", "1", "--epochs", "15", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] >= 0.94


@pytest.mark.slow
@pytest.mark.skipif(not ROOT, reason="GRAND_FAST_DATA is not set to a folder with Cora")
def test_cora_reaches_its_accuracy(capsys):
    options = ["--variant", "l", "--epochs", "150"]  # of 400
    assert cli.main(["train", "--dataset", "Cora", "--root", ROOT, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] >= 0.80
