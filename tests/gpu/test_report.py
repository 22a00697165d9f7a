"""The command `gpu-report`, on a small graph."""

import json

import pytest

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from bench.__main__ import main
from bench.gpu_report import golden
from bench.gpu_report.compile import MODELLED
from bench.gpu_report.suite import ORDERS, PICTURE

QUICK = ["gpu-report", "--graph", "random", "--nodes", "3000", "--quick"]


@pytest.mark.slow
def test_report(tmp_path, capsys):
    assert main([*QUICK, "--json", str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for gpu in ("A100", "H100"):
        assert f"EXACT, {gpu}: " in out and f"MODEL, {gpu}, milliseconds, nothing ran: " in out
    assert "Worse than golden.json" not in out  # test_golden.py leaves this case of H100 to us
    assert (tmp_path / PICTURE).stat().st_size > 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["arch"] for row in rows} == set(MODELLED)
    modelled = [row["model"] for row in rows if "model" in row]
    others = ("_join", "edge_softmax", "stage_update", "error_ratio")  # gather no rows
    assert len(modelled) == sum(all(o not in row["kernel"] for o in others) for row in rows)
    for model in modelled:
        for order in ORDERS:
            assert model[order]["seconds"] >= model[order]["floor_s"] > 0


@pytest.mark.slow
def test_update_golden_says_what_changed(tmp_path, capsys, monkeypatch):
    # What test_golden.py compiles too, and without the family's kernels
    monkeypatch.setattr(golden, "MODELLED", MODELLED[:1])
    monkeypatch.setattr(golden, "CASES", golden.CASES[-1:])
    known = golden.load()
    name = golden.case_name(MODELLED[0], *golden.CASES[0])
    for kernel, shift in (("csr_diffusion_bwd_da", 9), ("attention_bwd_dq (heads)", -9)):
        known["kernels"][name][kernel]["registers"] += shift
    monkeypatch.setattr(golden, "PATH", tmp_path / "golden.json")
    golden.PATH.write_text(json.dumps(known))
    assert main(["gpu-report", "--update-golden"]) == 0
    out = capsys.readouterr().out
    assert f"Better than golden.json: {name} csr_diffusion_bwd_da: registers" in out
    assert f"Worse than golden.json: {name} attention_bwd_dq (heads): registers" in out
    assert set(golden.load()["kernels"]) == {name}


def test_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stopped:
        main(QUICK)
    assert stopped.value.code == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
