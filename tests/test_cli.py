"""The command line: what it prints and writes, its exit codes, and one line for each user error."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from grand_fast import cli, train
from grand_fast.checkpoint import load_checkpoint
from grand_fast.data import DATASETS, load
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.presets import PRESETS, Preset, preset

ROOT = os.environ.get("GRAND_FAST_DATA")
# Two epochs of a small model: seconds
QUICK = ["--epochs", "2", "--hidden", "8", "--attention-channels", "4", "--heads", "2",
         "--T", "1", "--backend", "reference"]  # fmt: skip
KEYS = {
    "dataset", "variant", "method", "seeds", "test_accuracy", "mean", "std", "seconds_per_epoch",
    "nfe_forward", "peak_memory_bytes", "parameters", "versions",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Results go to `runs/` below the current folder; threads only wait on models this small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRAND_FAST_DATA", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fails(capsys, arguments, code):
    """The one line on standard error of a command that must fail with `code`."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("grand-fast")
    return err


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
    assert content["nfe_forward"] >= nfe and content["nfe_backward"] >= 1
    assert isinstance(load_checkpoint(f"runs/digits-{content['variant']}"), GRAND)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--dataset", "cora2"],
            "--dataset: must be one of digits, Cora, CiteSeer, PubMed, Coauth",
        ),
        (
            ["--method", "rk45"],
            "--method: must be one of euler, midpoint, rk4, rk4_classic, dopri5",
        ),
        (["--variant", "gcn"], "--variant: must be one of l, nl, nl-rw, laplacian, mixed, got 'gcn'"),
        (["--split", "half"], "--split: must be one of planetoid, public, random, got 'half'"),
        (["--split", "public"], "--split public needs a split that comes with the data, got digits"),
        (["--backend", "tpu"], "--backend: must be one of auto, gpu, cpu, reference, got 'tpu'"),
        (["--device", "tpu"], "--device: must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--seeds", "0"], "--seeds: must be an integer at least 1, got '0'"),
        (["--epochs", "2.5"], "--epochs: must be an integer at least 1, got '2.5'"),
        (["--lr", "0"], "--lr: must be a number above 0, got '0'"),
        (["--T", "nan"], "--T: must be a number at least 0, got 'nan'"),
        (["--dropout", "1"], "--dropout: must be a number at least 0 and below 1, got '1'"),
        (["--heads", "3"], "`heads` must divide attention_channels=64, got 3"),
        (["--neighbours", "1797"], "`neighbours` must lie in [1, 1796], got 1797"),
        (["--labels-per-class", "60"], "`labels_per_class` must be at most"),
        (["--split", "planetoid"], "published for Cora, CiteSeer and PubMed, got digits"),
        (["--root", "."], "--root is not used by digits"),
        (["--dataset", "Cora", "--neighbours", "5"], "--neighbours builds the graph of digits"),
        (["--dataset", "Cora", "--labels-per-class", "5"], "needs --split random"),
        (["--method", "dopri5", "--step-size", "1"], "--step-size is not used by dopri5"),
        (["--tol-scale", "10"], "--tol-scale is not used by rk4, whose steps are --step-size"),
        (["--method", "bosh3", "--tol-scale", "10", "--rtol", "1e-3"], "give it alone"),
        (["--tol-scale-adjoint", "10"], "--tol-scale-adjoint needs --adjoint continuous"),
        (["--memory-limit", "1000", "--adjoint", "direct"], "needs --adjoint checkpoint, got"),
        (["--memory-limit", "1000"], "`memory_limit` must be at least"),
        (["--method", "uniformisation"], "`term` must be linear"),
        (["--dataset", "Cora", "--development", "5"], "--development needs --split random, got"),
        (["--variant", "laplacian", "--heads", "2"], "--heads is of the attention, which --varia"),
        (["--laplacian", "symmetric"], "--laplacian needs --variant laplacian or mixed, got nl"),
        (["--attention-threshold", "0.1"], "--attention-threshold needs --variant nl-rw or l, got"),
        (["--rewiring-top-k", "5"], "--rewiring-top-k needs --rewiring."),
        (["--rewiring", "heat", "--rewiring-alpha", "0.1"], "--rewiring-alpha needs --rewiring ppr"),
        (["--rewiring", "ppr", "--rewiring-t", "3"], "--rewiring-t needs --rewiring heat"),
        (["--rewiring", "ppr"], "`top_k` or `threshold` must be given, one of them, got neither"),
        (["--score", "dot"], "--score: must be one of scaled_dot, cosine, pearson, exp_kernel, gat"),
        (["--optimizer", "sgdd"], "--optimizer: must be one of adafactor, "),
        (["--optimizer", "rprop"], "`weight_decay` must be 0 with Rprop, which has none, got 0.001"),
        (["--augment", "-1"], "--augment: must be an integer at least 0, got '-1'"),
        (["--early-stop", "0.5"], "--early-stop: must be a number at least 1, got '0.5'"),
        (["--patience", "0"], "--patience: must be an integer at least 1, got '0'"),
        (["--data", "g.npz", "--dataset", "Cora"], "--dataset is not used with --data"),
        (["--data", "g.npz", "--root", "."], "--root is not used with --data"),
        (["--config", "none.toml"], "--config: none.toml: No such file or directory."),
        (["--hiden", "5"], "unrecognized arguments: --hiden 5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(capsys, arguments, words):
    assert words in fails(capsys, ["train", *arguments], 2)
    assert not Path("runs").exists()


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


def test_interrupt_before_there_are_weights(capsys, monkeypatch):
    interrupt_after(monkeypatch, 0)
    assert "Nothing was saved" in fails(capsys, ["train", *QUICK], 130)


@pytest.mark.parametrize(
    "options",
    [
        ["--score", "exp_kernel", "--normalizer", "squareplus", "--normalize", "sender",
         "--constant-init"],
        ["--variant", "nl-rw", "--attention-quantile", "0.3", "--augment", "2", "--no-source"],
        ["--variant", "l", "--attention-threshold", "0.01", "--batch-norm", "--mlp", "--fc-out"],
        ["--variant", "mixed", "--laplacian", "symmetric", "--use-labels", "--reweight"],
        ["--rewiring", "ppr", "--rewiring-top-k", "8", "--self-loops", "none"],
        ["--rewiring", "heat", "--rewiring-t", "2", "--rewiring-threshold", "0.02"],
        ["--kinetic", "0.1", "--jacobian", "0.01", "--early-stop", "2", "--patience", "1"],
        ["--max-nfe", "1000", "--optimizer", "AdamW", "--row-normalize", "--development", "500"],
    ],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_model_options(capsys, options):
    assert cli.main(["train", *QUICK, *options, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    names = [option[2:].replace("-", "_") for option in options if option.startswith("--")]
    for name in names:
        default = getattr(PRESETS["digits"], name.removeprefix("no_"))
        assert content["options"][name.removeprefix("no_")] != default or name == "no_source"
    model = load_checkpoint(f"runs/digits-{content['variant']}")
    assert sum(p.numel() for p in model.parameters()) == content["parameters"]


def test_an_option_may_be_set_to_nothing(capsys):
    assert cli.main(["train", *QUICK, "--self-loops", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["self_loops"] is None


CONFIG = """
# A comment
dataset = "digits"
variant = "l"
hidden = 8
heads = 2
attention_channels = 4
T = 1
epochs = 2
source = true
self_loops = "none"
method = "dopri5"
tol_scale = 1e4
"""


def test_config(capsys):
    Path("small.toml").write_text(CONFIG)
    options = ["--backend", "reference", "--config", "small.toml", "--json"]
    assert cli.main(["train", *options, "--hidden", "6", "--no-source"]) == 0
    chosen = json.loads(capsys.readouterr().out)["options"]
    assert (chosen["variant"], chosen["T"], chosen["epochs"]) == ("l", 1.0, 2)
    assert (chosen["hidden"], chosen["source"]) == (6, False)  # the command line wins
    assert chosen["self_loops"] is None
    assert chosen["labels_per_class"] == PRESETS["digits"].labels_per_class

    assert cli.main(["train", *options, "--rtol", "0.1"]) == 0  # a pair instead of the scale
    chosen = json.loads(capsys.readouterr().out)["options"]
    assert (chosen["rtol"], chosen["tol_scale"]) == (0.1, None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hiden = 5", "small.toml: unknown key 'hiden'. Did you mean hidden?"),
        ("zzz = 5", "small.toml: unknown key 'zzz'. See grand-fast train --help."),
        ("hidden = 2.5", "small.toml: hidden must be an integer at least 1, got '2.5'."),
        ("hidden = [2]", "small.toml: hidden must be one value, got list."),
        ("source = 1", "small.toml: source must be true or false, got '1'."),
        ('dataset = "cora2"', "small.toml: dataset must be one of digits, Cora,"),
        ("hidden 5", "small.toml is not TOML: "),
    ],
)
def test_bad_config(capsys, line, words):
    Path("small.toml").write_text(line)
    assert words in fails(capsys, ["train", "--config", "small.toml"], 2)


def own_graph(**more):
    """Two cliques of ten nodes."""
    ids = np.arange(20)
    pairs = [(i, j) for i in ids for j in ids if i != j and i // 10 == j // 10]
    np.savez("mine.npz", edge_index=np.array(pairs).T, x=np.eye(20)[:, :5], y=ids // 10, **more)


def test_own_graph(capsys):
    own_graph(train=np.array([0, 10]), val=np.array([1, 11]), test=np.arange(12, 20))
    assert cli.main(["train", *QUICK, "--data", "mine.npz", "--json"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert (content["dataset"], content["options"]["split"]) == ("mine", "public")
    assert "public split, 2 / 2 / 8 nodes" in err
    assert Path("runs/mine-nl/model.safetensors").is_file()


def test_own_graph_without_a_split(capsys):
    own_graph()
    command = ["train", *QUICK, "--data", "mine.npz"]
    line = fails(capsys, command, 2)
    assert "more nodes than that, got 20. Choose a smaller `development`" in line
    options = ["--development", "12", "--labels-per-class", "3"]
    assert cli.main([*command, *options]) == 0
    assert "random split, 6 / 6 / 8 nodes" in capsys.readouterr().out


def test_bad_own_graph(capsys):
    assert "mine.npz: no such file" in fails(capsys, ["train", "--data", "mine.npz"], 1)


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


def test_another_run_gets_a_folder_of_its_own(capsys):
    assert cli.main(["train", *QUICK]) == 0
    assert cli.main(["train", *QUICK, "--lr", "0.02"]) == 0
    assert cli.main(["train", *QUICK, "--lr", "0.02"]) == 0
    out = capsys.readouterr().out
    assert "runs/digits-nl/curves.png" in out and out.count("runs/digits-nl-2/curves.png") == 2
    line = fails(capsys, ["train", *QUICK, "--out", "runs/digits-nl-2"], 2)
    assert "got runs/digits-nl-2: lr 0.02 there, 0.03 here. Choose another, or --restart" in line


def test_an_interrupted_run_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(train, "STATE_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        assert cli.main(["train", *QUICK]) == 130
    capsys.readouterr()
    assert cli.main(["train", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "seed 0: goes on from runs/digits-nl/seeds/0.safetensors" in out
    assert cli.main(["train", *QUICK, "--out", "whole"]) == 0
    whole, resumed = (Path(f, "model.safetensors").read_bytes() for f in ("whole", "runs/digits-nl"))
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
    for field in fields(Preset):
        assert f"--{field.name.replace('_', '-')}" in out or f"[no-]{field.name}" in out
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


def test_presets():
    assert set(PRESETS) == set(DATASETS)
    assert preset(None, split="public", self_loops="none") == Preset(split="public", self_loops=None)
    assert preset("Cora", hidden=7, heads=None) == Preset(**(vars(PRESETS["Cora"]) | {"hidden": 7}))


@pytest.mark.slow
def test_digits_reach_their_accuracy(capsys):
    assert cli.main(["train", "--seeds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] >= 0.94


@pytest.mark.slow
@pytest.mark.skipif(not ROOT, reason="GRAND_FAST_DATA is not set to a folder with Cora")
def test_cora_reaches_its_accuracy(capsys):
    assert cli.main(["train", "--dataset", "Cora", "--root", ROOT, "--variant", "l", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"] >= 0.80
