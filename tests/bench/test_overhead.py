"""What an evaluation of f costs in Python, counted; and the suite that says so."""

import json
import sys

import pytest
import torch

from bench.__main__ import main
from bench.ops import overhead
from bench.ops.overhead import _solve, _traced


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    """The last is as warm as the last of 200."""
    monkeypatch.setattr(overhead, "STEPS", 10)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_an_evaluation_in_a_solve_goes_through_few_files_and_functions(mode):
    if sys.getprofile() is not None:
        pytest.skip("a profiler is at work")
    with torch.set_grad_enabled(mode == "training"):
        files, calls = _traced(_solve)
    # At least: the term, its plan, the operator; engine, launchers and two kernels
    assert 8 <= files <= 12 and 20 <= calls <= 40


def test_command_line(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["overhead", "--quick", "--json", str(tmp_path / "overhead.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "above them" in capsys.readouterr().out
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [row["op"] for row in rows[:2]] == ["evaluation of f"] * 2
    assert all(0 < row["launchers_s"] < row["seconds"] for row in rows)
