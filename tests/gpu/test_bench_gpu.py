"""The suite `gpu` without a GPU: kernels in Triton's interpreter, the clock of the CPU."""

import argparse
import json
import sys
from dataclasses import replace

import pytest
import torch

from ._mode import INTERPRETED, skip_module

if not INTERPRETED:
    skip_module(__file__)

from bench.core import graphs
from bench.core.harness import Budget, interleave, timed
from bench.core.problem import OURS, Competitor, Shape, UnavailableError
from bench.core.report import Report
from bench.gpu import competitors, correctness, search, suite
from bench.gpu.device import clock, rates
from bench.peers import dgl

SHAPE = Shape(8, 2, 8)
SMALL = {"kinds": ("random",), "sizes": ((5, 2, 3),), "nodes": 8}


class Host:
    """What `Cuda` is, where the kernels are interpreted."""

    device, backend, arch = torch.device("cpu"), "gpu", "sm_80"

    def header(self):
        return {"device": "interpreter"}

    def seconds(self, call):
        return timed(call)

    def peak_bytes(self, call):
        call()
        return 12_345_678

    def free_bytes(self):
        return 1 << 30


def options(tmp_path, **others):
    values = {"graph": "random", "nodes": 8, "shape": SHAPE, "rounds": 1, "quick": True,
              "minutes": 8.0, "out": tmp_path} | others  # fmt: skip
    return argparse.Namespace(**values)


def report():
    return Report("gpu", {"graph": "random"})


@pytest.fixture
def _few_competitors(monkeypatch):
    """Without those that torch.compile takes a minute for."""
    peers = competitors.peers

    def few(module):
        slow = ("torch.compile", "sampled_addmm + CSR")
        return tuple(c for c in peers(module) if c.name not in slow)

    monkeypatch.setattr(competitors, "peers", few)


@pytest.mark.usefixtures("_few_competitors")
def test_the_whole_suite(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "MODULES", suite.MODULES[:3:2])
    monkeypatch.setattr(suite, "_DTYPES", (torch.float32,))
    dtypes, few = correctness.DTYPES[:1], correctness.FAMILY[14:16]
    monkeypatch.setitem(correctness.check_kernels.__kwdefaults__, "dtypes", dtypes)
    monkeypatch.setattr(correctness, "FAMILY", few)
    monkeypatch.setattr(search, "_REGISTERS", (64,))
    monkeypatch.setattr(search, "_PIECES", (512,))
    got = report()
    suite.measure(Host(), options(tmp_path), got, scale=1e-5, **SMALL)
    assert not got.failed
    out = capsys.readouterr().out
    assert "interpreter: copy_gb_per_s" in out and "attention_diffusion 8/2/8 float32" in out
    checks = [row for row in got.rows if "check" in row]
    by_op = {row["op"]: row["cases"] for row in checks}
    assert set(by_op) == {o.name for o in (*correctness.OPERATORS, *few)}
    assert all(by_op[o.name] == len(dtypes) for o in correctness.OPERATORS)
    assert all(row["cases"] and not row["failed"] for row in checks)
    timed_rows = [row for row in got.rows if "competitor" in row]
    assert {row["mode"] for row in timed_rows} == {"forward", "forward+backward"}
    assert {"grand-fast", "eager reference", "cuSPARSE SpMM (torch.sparse)"} <= {
        row["competitor"] for row in timed_rows
    }
    assert all(row["peak_bytes"] == 12_345_678 and row["over_ours"] > 0 for row in timed_rows)
    assert all(row["copy_percent"] > 0 for row in timed_rows if row["mode"] == "forward")
    kernels = [row for row in got.rows if row.get("mode") == "kernel"]
    assert {"attention_diffusion_fwd (scaled, one_sweep)", "attention_bwd_dq (state)"} <= {
        row["kernel"] for row in kernels
    }
    assert any(v["changed"].startswith("BLOCK_E") for row in kernels for v in row["variants"])
    assert any("DGL is not installed" in text for text in got.skipped)
    assert all((tmp_path / name).stat().st_size > 0 for name in suite.PICTURES)
    got.write(tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text())["header"]["device"] == "interpreter"


def test_the_family_is_whole():
    names = {operator.name.removesuffix(" weighted") for operator in correctness.FAMILY}
    assert len(names) == len(correctness.FAMILY) == 2 * 5 * 2 * 2
    weighted = [o.name for o in correctness.FAMILY if "edge_weight" in o.shapes]
    assert len(weighted) == len(names) / 2
    assert all(text in " ".join(weighted) for text in ("softmax sender", "squareplus receiver"))


def compare(found, *added, module=suite.MODULES[2], budget=None):
    known = {c.name: c for c in competitors.peers(module)}
    competitors.compare(
        module, graphs.load("random", nodes=8), SHAPE, torch.float32, Host(),
        {"copy_gb_per_s": 1.0}, found, budget or Budget(60.0), rounds=1,
        competitors=(known[OURS], *added),
    )  # fmt: skip


def names(found):
    return {row["competitor"] for row in found.rows}


def test_what_disagrees_gets_no_time():
    found = report()
    wrong = Competitor("wrong", lambda problem: lambda x, a: x * a.sum() * 1e-3)
    compare(found, wrong)
    assert names(found) == {OURS}
    assert len(found.failed) == 1 and "csr_diffusion 8/2/8 float32: wrong: out" in found.failed[0]


def test_a_peer_that_fails_costs_only_itself():
    def out_of_memory(problem):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def unknown(problem):
        raise NotImplementedError("no such kernel\nand more")

    found = report()
    huge = Competitor("huge", unknown, edge_floats=lambda shape: 1 << 40)
    compare(found, Competitor("big", out_of_memory), Competitor("new", unknown), huge)
    assert names(found) == {OURS}
    assert not found.failed
    texts = "\n".join(found.skipped)
    assert "big: out of memory." in texts and "new: no such kernel" in texts
    assert "huge: needs about" in texts and "GB are free" in texts


def test_our_own_failure_is_not_hidden():
    broken = Competitor(OURS, lambda problem: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        competitors.compare(
            suite.MODULES[2], graphs.load("random", nodes=8), SHAPE, torch.float32, Host(),
            {"copy_gb_per_s": 1.0}, report(), Budget(60.0), rounds=1,
            competitors=(broken,),
        )  # fmt: skip


def test_a_wrong_kernel_fails_the_check():
    def wrong(*, graph, backend, **tensors):
        y = correctness.OPERATORS[3].call(graph=graph, backend=backend, **tensors)
        return y * 1.01 if backend == "gpu" else y

    found, operator = report(), replace(correctness.OPERATORS[3], call=wrong)
    correctness.check_kernels(Host(), found, Budget(60.0), **SMALL, operators=(operator,))
    assert len(found.failed) == len(correctness.DTYPES)
    assert "stage_update on random, d=5 H=2 d_k=3 float32: out: error" in found.failed[0]


def test_a_variant_is_checked_before_it_is_timed(monkeypatch):
    passes = suite.kernel_passes(graphs.load("random", nodes=8), SHAPE, Host())
    run = search._run

    def spoiled(launch):
        run(launch)
        if launch.kwargs.get("sizes", {}).get("BLOCK_E") == 2:
            search._tensors(launch)[0].add_(1.0)

    monkeypatch.setattr(search, "_run", spoiled)
    monkeypatch.setattr(search, "_PIECES", ())
    name = "csr_diffusion forward"
    found = report()
    search.measure_kernels({name: passes[name]}, Host(), found, Budget(60.0), rounds=5)
    assert any("BLOCK_E=2: error" in text for text in found.skipped)
    assert not any(v["changed"] == "BLOCK_E=2" for row in found.rows for v in row["variants"])


def test_budget():
    now = [0.0]
    budget = Budget(10.0, clock=lambda: now[0])
    assert budget.allows("first") and budget.left == 10.0
    now[0] = 8.0
    assert budget.allows("second", 1.0) and not budget.allows("third", 5.0)
    now[0] = 11.0
    assert not budget.allows("fourth")
    assert budget.left_out == ["third", "fourth"]


def test_no_time_is_said():
    found, budget = report(), Budget(0.0)
    compare(found, budget=budget)
    assert not found.rows and budget.left_out == ["csr_diffusion 8/2/8 float32"]


def test_rounds_are_cut_to_the_budget():
    calls = {"a": lambda: None, "b": lambda: None}
    assert len(interleave(calls, rounds=9, budget_s=60.0, **clock(Host()))["a"].seconds) == 9
    assert len(interleave(calls, rounds=99, budget_s=0.0, **clock(Host()))["b"].seconds) == 5


def test_rates():
    found = rates(Host(), 8, scale=1e-4)
    assert found["copy_gb_per_s"] > 0 and found["gather_gb_per_s"] > 0


@pytest.mark.skipif("dgl" in sys.modules, reason="DGL is installed")
def test_dgl_is_asked_for():
    with pytest.raises(UnavailableError, match="DGL is not installed"):
        dgl.csr_diffusion(None)
