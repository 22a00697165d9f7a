"""The machine code of every GPU kernel is no worse than golden.json has it."""

import json
from dataclasses import replace

import pytest

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from bench.gpu_report import golden
from bench.gpu_report.compile import MODELLED
from bench.gpu_report.metrics import Metrics

from ._cases import CASES

KNOWN = golden.load()
METRICS = Metrics(
    registers=64, spills=0, shared=0, warps=32, wide_percent=90.0, instructions=50.0, fp=20.0,
    shuffles=5.0, mufu=1.0, barriers=0.0, bytes_in_flight=4096,
)  # fmt: skip


# Half of the cases, which others compile too; gpu-report --update-golden compares all, and
# test_report.py that of the first shape on an H100.
HALF = [
    case
    for case in CASES
    if case[0] in MODELLED
    and case[1:] in golden.CASES
    and (case[0] == MODELLED[0] or case[1:] != golden.CASES[0])
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "shape", "dtype"), HALF, ids=[golden.case_name(*case) for case in HALF]
)
def test_no_kernel_is_worse_than_golden(arch, shape, dtype):
    if not golden.is_of_this_compiler(KNOWN):
        pytest.skip(f"golden.json is of triton {KNOWN['triton']}; renew it by: {golden.UPDATE}")
    case = golden.case_name(arch, shape, dtype)
    now = golden.measure(arch, shape, dtype)
    found = golden.missing(case, now, KNOWN) + golden.compare(case, now, KNOWN).worse
    assert not found, "\n".join([*found, f"If that is meant: {golden.UPDATE}"])


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({"registers": 68, "instructions": 50.9}, 0),  # within the slack
        ({"registers": 69}, 1),
        ({"spills": 1}, 1),
        ({"warps": 31}, 1),
        ({"wide_percent": 89.0}, 1),
        ({"instructions": 51.5}, 1),
        ({"shuffles": 5.5, "barriers": 1.0}, 2),
        ({"registers": 50, "instructions": 40.0, "warps": 40}, 0),
        ({"mufu": 2.0, "shared": 128}, 2),
        ({"bytes_in_flight": 3700}, 0),
        ({"bytes_in_flight": 3600}, 1),
        ({"fp": 30.0}, 0),
    ],
    ids=str,
)
def test_what_is_worse(change, worse):
    known = {"triton": "", "kernels": {"case": {"kernel": vars(METRICS)}}}
    found = golden.compare("case", {"kernel": replace(METRICS, **change)}, known)
    assert len(found.worse) == worse
    assert all("case kernel: " in sentence and " → " in sentence for sentence in found.worse)


def test_what_is_better_is_told():
    known = {"triton": "", "kernels": {"case": {"kernel": vars(METRICS)}}}
    found = golden.compare("case", {"kernel": replace(METRICS, instructions=40.0)}, known)
    assert found.worse == []
    assert found.better == ["case kernel: instructions 50 → 40"]


def test_kernels_of_one_side_only_are_named():
    known = {"triton": "", "kernels": {"case": {"old": vars(METRICS)}}}
    found = golden.missing("case", {"new": METRICS}, known)
    assert found == ["case old: no longer launched", "case new: new"]


def test_saved_as_json(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "PATH", tmp_path / "golden.json")
    assert golden.load()["kernels"] == {}
    golden.save({"case": {"one": METRICS, "two": METRICS}})
    known = golden.load()
    assert golden.is_of_this_compiler(known)
    assert Metrics(**known["kernels"]["case"]["two"]) == METRICS
    assert json.loads(golden.PATH.read_text()) == known
