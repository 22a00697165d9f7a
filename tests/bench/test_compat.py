"""The suite `compat`, on a program of this file: compared, timed, stopped, and its faults."""

import gc
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.compat import compare
from bench.compat.compare import differences
from bench.compat.program import Program, Run, run
from grand_fast.compat import active
from tests.compat import _released

PROGRAM = """\
import argparse
import torch
from torch import nn
from torchdiffeq import odeint
import layers

parser = argparse.ArgumentParser()
parser.add_argument("--dataset")
parser.add_argument("--fault", default="")
parser.add_argument("--epoch", type=int, default=100)
args = parser.parse_args()
assert args.fault != "stock", "no such data"
layers.runs = getattr(layers, "runs", 0) + 1
assert layers.runs == 1, "a module of another run"
fault = args.fault if odeint.__module__.startswith("grand_fast.") else ""
edge, opt = layers.edges(), layers.OPT | {"method": "rk4"}
block = layers.Block(layers.Field(opt, edge), opt)
model = nn.Sequential(nn.Linear(layers.D, layers.D), block, nn.Linear(layers.D, 3))
x, y = torch.randn(layers.N, layers.D), torch.randint(3, (layers.N,))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for epoch in range(args.epoch):
    optimizer.zero_grad()
    block.odefunc.nfe = 0
    loss = nn.functional.cross_entropy(model(x), y)
    (1.01 * loss if fault == "loss" else loss).backward()
    if fault == "gradient":
        block.odefunc.alpha_train.grad *= 1.01
    if fault == "evaluations":
        block.odefunc(0.0, x)
    optimizer.step()
    assert fault != "raises", "not on these kernels"
    print("epoch", epoch)
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch, in_this_process, one_thread) -> Path:
    monkeypatch.setattr(compare.machine, "keep_memory", lambda: True)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that other tests have left: slow
    source = tmp_path / "theirs" / "src"
    source.mkdir(parents=True)
    shutil.copy(_released.__file__, source / "layers.py")
    (source / "run_GNN.py").write_text(PROGRAM)
    return tmp_path / "theirs"


def test_command_line(repository, tmp_path, capsys):
    before = torch.Tensor.backward, Path.cwd(), list(sys.path), sys.argv
    file = tmp_path / "found.json"
    command = ["compat", "--repository", str(repository), "--dataset", "Cora", "--rounds", "1",
               "--epochs", "2", "--json", str(file), "--", "--epoch", "50"]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "theirs/src/run_GNN.py --dataset Cora --epoch 50: an epoch" in out
    assert "torchdiffeq.odeint" in out and "epoch 0" not in out
    found = json.loads(file.read_text())
    rows = found["rows"]
    assert [(row["allocator"], row["competitor"]) for row in rows] == [
        (allocator, name) for allocator in ("keep", "system") for name in ("as it is", "grand-fast")
    ]
    for row in rows:
        assert row["rounds"] == 2 and row["evaluations"] == 8  # two steps of RK4
        assert 0 < row["p10_s"] <= row["median_s"] and row["cpu"]["median_s"] > 0
    for row, ours in zip(rows[::2], rows[1::2], strict=True):
        assert row["over_ours"][0] == pytest.approx(row["median_s"] / ours["median_s"])
    assert len(found["figures"]) == 4 and found["header"]["allocator"] == "both"
    one = found["header"]["compat"]["keep"]["differences"]
    assert one["evaluations"]["ours"] == 0 and one["loss"]["ours"] < 1e-5
    assert all(0 <= row["ours"] <= row["allowed"] for row in one.values())
    assert (torch.Tensor.backward, Path.cwd(), list(sys.path), sys.argv) == before
    assert not active.stack and "layers" not in sys.modules


@pytest.mark.parametrize(
    ("fault", "says"),
    [("loss", "loss, of a step: differs by 1.0e-02, more than 1.0e-03"),
     ("gradient", "by a parameter, at the first step: differs by 1.0e-02, more than 1.0e-03"),
     ("evaluations", "evaluations of the vector field, of a step: differs by 1.2e-01"),
     ("raises", "exit code 1: Traceback")],
)  # fmt: skip
def test_what_disagrees_gets_no_time(repository, fault, says, capsys):
    command = ["compat", "--repository", str(repository), "--allocator", "system", "--epochs", "1"]
    assert main([*command, "--", "--fault", fault]) == 1
    out = capsys.readouterr().out
    assert "NOT TIMED, disagrees with the program as it is" in out and says in out
    assert ": an epoch\n" not in out


def test_no_such_program(repository, capsys):
    command = ["compat", "--repository", str(repository)]
    for more, says in (
        (["--script", "none.py"], "there is no file"),
        (["--", "--fault", "stock"], "exit code 1, 0 steps of an optimiser were made"),
        (["--", "--epoch", "1"], "exit code 0, 1 steps"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert says in error and ("no such data" in error) is ("stock" in more)


def test_runs_are_alike_and_sums_in_another_order_are_not(repository):
    program = Program(repository, repository / "src" / "run_GNN.py", (), epochs=2)
    first, again, other = (run(program, mode) for mode in ("stock", "stock", "reordered"))
    assert len(first.values["loss"]) == 3 and first.report == ""
    assert not any(map(any, differences(first, again).values()))
    found = differences(first, other)
    assert sum(found["gradient"]) > 0 and max(found["loss"]) < 1e-5
    assert found["evaluations"] == [0.0] * 3
    assert os.getcwd() != str(program.script.parent)


def run_of(**values):
    numbers = {"loss": 2.0, "norm": 1.0, "evaluations": 4.0} | values
    gradient = numbers.pop("gradient", [torch.ones(3), None])
    return Run({key: [torch.tensor(v)] for key, v in numbers.items()} | {"gradient": gradient})


def test_differences():
    want = run_of()
    found = differences(want, run_of(loss=math.nan, evaluations=5.0, norm=0.0))
    expected = {"loss": [math.inf], "norm": [1.0], "evaluations": [0.25], "gradient": [0.0, 0.0]}
    assert found == expected
    other = run_of(gradient=[1.5 * torch.ones(3), torch.ones(3), None])
    assert differences(want, other)["gradient"] == [0.5, math.inf, 0.0]
    assert differences(want, Run())["loss"] == [math.inf]
    small = [run_of(gradient=[sign * 1e-9 * torch.ones(3)]) for sign in (1, -1)]
    [off] = differences(*small)["gradient"]
    assert off == pytest.approx(2e-9 * 3**0.5 / compare.SMALLEST)
    assert differences(run_of(loss=0.0), run_of(loss=0.0))["loss"] == [0.0]


def test_the_first_epoch_is_not_timed(monkeypatch):
    made = run_of()
    made.values["loss"] *= 3
    made.seconds = {"wall_s": [9.0, 1.0, 2.0], "cpu_s": [8.0, 3.0, 4.0]}
    monkeypatch.setattr(compare, "run", lambda program, mode: made)
    program = Program(Path(), Path("x.py"), (), epochs=2)
    found = compare.measure(program, keep=False, threads=None, rounds=2, tolerance=1e-3)
    epochs = [{"wall_s": [1.0, 2.0], "cpu_s": [3.0, 4.0]}] * 2
    assert found["stock"] == found["patched"] == epochs and not found["failed"]
    monkeypatch.setattr(compare.machine, "keep_memory", lambda: False)
    found = compare.measure(program, keep=True, threads=None, rounds=2, tolerance=1e-3)
    assert "--allocator system" in found["errors"]


def test_the_worst_is_the_most_of_what_is_allowed():
    row = compare._worst([0.0, 3e-3, 2e-3], [1e-2, 1e-2], tolerance=1e-3)
    assert row == {"ours": 2e-3, "orders": 0.0, "allowed": 1e-3}
