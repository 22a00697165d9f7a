"""The suite `solvers`: its competitors agree, take the same steps, and its command line runs."""

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.core import graphs, machine
from bench.core.check import check, named
from bench.core.problem import OURS, Shape, gradients
from bench.core.report import Report
from bench.solvers import precision, step
from bench.solvers.problem import CHECKPOINT, RELEASED, SOLVERS, setup
from bench.solvers.solve import TOLERANCE
from grand_fast.testing import assert_close

SHAPE = Shape(8, 2, 8)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_agree(name: str) -> None:
    problem = setup(graphs.load("random", nodes=300), SHAPE)
    wide = problem.double()
    want = named(wide, *gradients(SOLVERS[CHECKPOINT].make(wide, 2), wide))
    function = SOLVERS[name].make(problem, 2)
    check(name, function, problem, want, tolerance=dict.fromkeys(want, TOLERANCE))


@pytest.mark.parametrize(("method", "attempts"), [("rk4", 4), ("dopri5", 6)])
def test_steps_of_copies_are_the_same(method: str, attempts: int) -> None:
    x = torch.randn(2000, 8)
    found = {}
    for name in (OURS, step.TORCHDIFFEQ):
        f = step.Copies()
        found[name] = step.solve(name, method, x, f)
        assert step.attempts(method, f.calls) == attempts
    assert_close(method, found[OURS], found[step.TORCHDIFFEQ])


def test_the_reference_is_confirmed_by_a_second_method(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = setup(graphs.load("random", nodes=300), SHAPE).double()
    report = Report("solvers", {})
    for variant in precision.VARIANTS:
        precision._reference(variant, problem, report)
    assert not report.failed
    monkeypatch.setattr(precision, "EXACT", 1e-2)
    for variant in precision.VARIANTS:
        precision._reference(variant, problem, report)
    assert [text.split(":")[0] for text in report.failed] == list(precision.VARIANTS)


def test_the_released_sequence_on_arxiv_fits_no_small_machine() -> None:
    problem = setup(graphs.load("random", nodes=300), Shape(128, 4, 128))
    rows = problem.graph.num_edges * 2 * 128 * 4  # a query and a key an edge, per evaluation
    assert SOLVERS[RELEASED].bytes_needed(problem, 4) > 16 * rows
    with pytest.raises(machine.DoesNotFitError, match="are available"):
        machine.require_memory("it", SOLVERS[RELEASED].bytes_needed(problem, 10**6))


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process", "one_thread")
def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(graphs.DATA_VARIABLE, raising=False)  # work and precision on one graph
    monkeypatch.setattr(precision, "STAGES", {"rk4": 4, "explicit_adams": 1})
    monkeypatch.setattr(precision, "ADAPTIVE", ("dopri5",))
    code = main(["solvers", "--nodes", "500", "--channels", "8", "--attention-channels", "8",
                 "--quick", "--json", str(tmp_path / "solvers.json"),
                 "--out", str(tmp_path)])  # fmt: skip
    assert code == 0, capsys.readouterr().out
    values = json.loads((tmp_path / "solvers.json").read_text())
    assert {row["op"] for row in values["rows"]} == {"step", "solve", "kept", "precision"}
    assert all(row["median_s"] > 0 for row in values["rows"] if row["op"] != "kept")
    figures = {figure["figure"] for figure in values["figures"]}
    assert figures >= {
        "own part of a RK4 step, time: ours over torchdiffeq",
        "own part of a DOPRI5 attempt, time: ours over torchdiffeq",
        "checkpoint, memory kept per RK4 step, 4 to 16 steps",
        "memory_limit, 16 RK4 steps: peak above inputs over the limit",
    }
    for picture in ("solvers_work_precision", "solvers_solve"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 0
