"""The bars that the report holds the kernels to, on figures made up."""

import pytest

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from bench.core.problem import Shape
from bench.core.report import Report
from bench.gpu_report.bars import missed, print_bars

SHAPE = Shape(128, 4, 128)


def row(kernel="attention_bwd_dq (state)", *, dtype="float32", wide=97.0, **times):
    seconds = {"dram_s": 1.0, "l2_s": 0.5, "pipe_s": 0.9, "latency_s": 0.8, "seconds": 1.0,
               "added_s": 1.9, "floor_s": 1.0, "bound": "dram"} | times  # fmt: skip
    exact = {"spills": 0, "barriers": 0.0}
    return {"kernel": kernel, "dtype": dtype, "shape": str(SHAPE), "gpu": "A100", "exact": exact,
            "float_atomics": 0, "gathered_wide_percent": wide,
            "model": {"natural": seconds, "rcm": seconds}}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (row(), []),
        (row(pipe_s=1.1, added_s=2.1), ["added 2.10 > 2", "others 1.10 > 1"]),
        (row(latency_s=1.1), ["others 1.10 > 1"]),
        (row(seconds=1.4), ["community 1.40 > 1.3"]),
        (row(bound="longest"), ["bound by the longest piece"]),
        (row(wide=89.0), ["128-bit 89 % < 90 %"]),
        (row(dtype="bfloat16", wide=0.0, pipe_s=1.4, added_s=2.504), []),
        (row(dtype="bfloat16", added_s=2.506), ["added 2.51 > 2.5"]),
    ],
    ids=lambda value: "; ".join(value) or "none" if isinstance(value, list) else "",
)
def test_missed(given, texts):
    assert missed(given, SHAPE) == texts


def test_narrow_loads_of_a_width_that_allows_no_others():
    assert missed(row(wide=0.0), Shape(162, 2, 32)) == []


def test_printed(capsys):
    report = Report("gpu-report", {})
    spilling = row("attention_diffusion_fwd (one_sweep)", added_s=2.2)
    spilling["exact"]["spills"] = 3
    absorbed = row("attention_diffusion_fwd (one_sweep, absorbed)", added_s=3.0)
    other = {
        "kernel": "stage_update_fwd",
        "exact": {"spills": 0, "barriers": 2.0},
        "float_atomics": 0,
    }
    rows = [row(), spilling, absorbed, other]
    print_bars(rows, {str(SHAPE): SHAPE}, report)
    lines = [line for line in capsys.readouterr().out.splitlines() if "A100" in line]
    assert [line.split("|")[-2].strip() for line in lines] == ["met", "added 2.20 > 2", "no bar"]
    assert "row pass" in lines[0] and "forward, absorbed" in lines[2]
    figures = {f["figure"].split(",")[0]: (f["value"], f["unit"]) for f in report.figures}
    assert figures == {
        "passes that meet their bars": (1, "of 2"),
        "spill instructions": (3, "bar 0: MISSED"),
        "atomics on floats": (0, "bar 0: met"),
        "barriers in a turn of a loop": (2.0, "bar 1: MISSED"),
    }
