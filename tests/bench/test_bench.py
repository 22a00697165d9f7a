"""The benchmarks: statistics, graphs, agreement of every peer, and the command line."""

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import jaxtyping
import pytest
import torch

import grand_fast as gf
from bench.__main__ import main
from bench.core import floor, graphs, machine
from bench.core.check import agreeing, check, expected, named
from bench.core.configurations import CONFIGURATIONS, Configuration
from bench.core.fresh import run as run_fresh
from bench.core.harness import MIN_ROUNDS, Timing, interleave
from bench.core.options import SUITES
from bench.core.problem import OURS, Competitor, Problem, Shape, UnavailableError, gradients
from bench.core.report import Report
from bench.ops import bench_attention_diffusion, bench_csr_diffusion, scaling
from bench.ops.passes import csr_passes, hub_graphs
from bench.ops.suite import MODULES
from bench.peers.unfused import has_compiler
from bench.tuned import problem as tuned
from bench.tuned import suite
from grand_fast.kernels.cpu.rows import slabs
from grand_fast.kernels.csr_diffusion import cpu
from grand_fast.testing import assert_close
from tests.bench import _fresh_tasks

ROOT = Path(__file__).parents[2]
SHAPE = Shape(10, 2, 6)


def _slow_if_compiled(module: ModuleType, competitor: Competitor) -> list[pytest.MarkDecorator]:
    compiles = competitor.name in ("torch.compile", "sampled_addmm + CSR")
    missing = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
    return [pytest.mark.slow, missing] if compiles else []


@pytest.fixture
def _shapes_unchecked() -> Iterator[None]:
    """torch.compile cannot trace the shape checks that our tests put into the references."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_timing_percentiles() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert timing.median == 3.0
    assert timing.record() == {"median_s": 3.0, "p10_s": 1.4, "p90_s": 4.6, "rounds": 5}


def test_interleave_rounds() -> None:
    order: list[str] = []
    calls = {"quick": lambda: order.append("quick"), "slow": lambda: order.append("slow")}
    timings = interleave(calls, rounds=6)
    assert order == ["quick", "slow"] * 7  # one warm-up, six rounds
    assert all(len(t.seconds) == 6 for t in timings.values())
    few = interleave({"slow": lambda: None}, rounds=10, budget_s=0.0)
    assert len(few["slow"].seconds) == MIN_ROUNDS
    order.clear()
    repeated = interleave(calls, rounds=2, repeats={"quick": 3})
    assert order == ["quick", "slow"] + ["quick", "quick", "quick", "slow"] * 2
    assert len(repeated["quick"].seconds) == 2


@pytest.mark.parametrize("accumulators", machine.ACCUMULATORS)
def test_multiply_adds_are_all_made(accumulators: int) -> None:
    """With a factor of 1 each adds 1, and the numbers stay exact in float32."""
    factor, total = torch.ones(16), torch.zeros(3, 16)
    kernel = machine._multiply_add_kernel(accumulators)
    kernel(slabs(3, 1), pieces=False, factor=factor, total=total, steps=10)
    assert (total == 10 * accumulators + sum(range(accumulators))).all()
    assert machine.MULTIPLY_ADD_FLOPS % (machine.MULTIPLY_ADD_TASKS * accumulators * 2 * 16) == 0


def test_floor_adds_gathers_and_arithmetic_at_peak() -> None:
    problem = bench_attention_diffusion.setup(graphs.load("random", nodes=300), SHAPE)
    seconds = {"gather of x rows": 0.2, "gather of k rows": 0.1, "multiply-adds": 0.5, "copy": 1.0}
    assert set(floor.calls(problem)) == set(seconds)
    timings = {name: Timing((value,)) for name, value in seconds.items()}
    flops = 2 * 300 * SHAPE.channels * 2 * SHAPE.attention_channels
    forward = 0.3 + 0.5 * flops / machine.MULTIPLY_ADD_FLOPS
    assert floor.seconds(problem, timings)["forward"] == pytest.approx(forward)
    assert floor.seconds(problem, timings)["forward+backward"] == pytest.approx(3 * forward)
    rates = floor.rates(problem, timings)
    assert rates["multiply_add_gflop_per_s"] == pytest.approx(machine.MULTIPLY_ADD_FLOPS / 0.5e9)
    # Rows of 10 and of 6 floats lie on one cache line each.
    assert rates["gather_gb_per_s"] == pytest.approx(problem.graph.num_edges * 2 * 64 / 0.3e9)


def test_hub_graphs_keep_the_hubs_row_only() -> None:
    graph = graphs.load("random", nodes=2000)
    longest = int(graph.rowptr.diff().max())
    alone, bare = hub_graphs(graph)
    assert alone.num_nodes == bare.num_nodes == longest  # the hub is among its senders
    assert alone.num_edges == int(alone.rowptr.diff().max()) == longest
    assert torch.equal(alone.col.sort().values.long(), torch.arange(longest))
    assert bare.num_edges == 0


@pytest.mark.parametrize("name", ["random", "local", "grid"])
def test_generated_graph(name: str) -> None:
    graph = graphs.load(name, nodes=5000)
    again = graphs.load(name, nodes=5000)
    assert graph.num_nodes == 5000
    assert graph.is_symmetric()
    assert torch.equal(graph.col, again.col)
    sender, receiver = graph.edge_index()
    assert int((sender == receiver).sum()) == 5000
    if name != "grid":
        assert graph.num_edges == pytest.approx(5000 * graphs.edges_per_node(), abs=2)


def test_random_graph_has_arxivs_degrees() -> None:
    degree = graphs.load("random").rowptr.diff() - 1  # less the loop
    assert degree.numel() == graphs.ARXIV_NODES
    assert int(degree.sum()) == pytest.approx(graphs.ARXIV_EDGES - graphs.ARXIV_NODES, abs=2)
    assert 10_000 < int(degree.max()) < 16_000  # arxiv: 13,161
    assert float(degree.float().quantile(0.99)) == pytest.approx(106, rel=0.1)


def test_local_graph_is_local() -> None:
    def near(name: str) -> float:
        sender, receiver = graphs.load(name, nodes=50_000).edge_index()
        return float(((sender - receiver).abs() < graphs.NEAR_WINDOW).float().mean())

    assert near("local") > 2 * near("random")


@pytest.mark.parametrize(
    ("module", "competitor"),
    [
        pytest.param(m, c, id=f"{m.__name__.split('bench_')[1]}-{c.name}",
                     marks=_slow_if_compiled(m, c))
        for m in MODULES
        for c in m.COMPETITORS
    ],
)  # fmt: skip
@pytest.mark.usefixtures("_shapes_unchecked")
def test_peer_agrees_with_reference(module: ModuleType, competitor: Competitor) -> None:
    problem = module.setup(graphs.load("random", nodes=300), SHAPE)
    function = competitor.make(problem)
    if competitor.exact:
        check(competitor.name, function, problem, expected(problem))
    else:
        out, grads = gradients(function, problem)
        assert out.shape == (300, SHAPE.attention_channels)
        assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split("bench_")[1])
def test_expected_is_the_reference(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks of rows, as on the whole graph at once."""
    problem: Problem = module.setup(graphs.load("random", nodes=200), SHAPE)
    whole = expected(problem)
    monkeypatch.setattr("bench.core.check.BLOCK_EDGES", 100)  # shorter than the longest row
    for name, value in expected(problem).items():
        assert_close(name, value, whole[name])


def test_check_refuses_a_wrong_gradient() -> None:
    problem = bench_csr_diffusion.setup(graphs.load("random", nodes=100), SHAPE)
    right = bench_csr_diffusion.ours(problem)
    with pytest.raises(AssertionError, match="wrong: da"):
        check("wrong", lambda x, a: right(x, 1.01 * a - 0.01 * a.detach()), problem,
              expected(problem))  # fmt: skip


def test_what_disagrees_or_is_missing_is_named_and_not_timed() -> None:
    problem = bench_csr_diffusion.setup(graphs.load("random", nodes=100), SHAPE)

    def missing(problem: Problem) -> NoReturn:
        raise UnavailableError("not installed")

    competitors = [
        Competitor("right", bench_csr_diffusion.ours),
        Competitor("wrong", lambda problem: lambda x, a: 2 * x * a.sum()),
        Competitor("other", lambda problem: lambda x, a: 2 * x * a.sum(), exact=False),
        Competitor("missing", missing),
        Competitor("huge", bench_csr_diffusion.ours, edge_floats=lambda shape: 10**12),
    ]
    report = Report("ops", {})
    found = agreeing(problem, competitors, "case", report)
    assert list(found) == ["right", "other"]
    assert all(seconds > 0 for _, seconds in found.values())
    assert len(report.failed) == 1 and report.failed[0].startswith("case: wrong: ")
    assert report.skipped[0] == "case: missing: not installed"
    assert "case: huge" in report.skipped[1] and "needs about" in report.skipped[1]


@pytest.mark.parametrize("inverse", [False, True])
def test_ratios_to_ours(inverse: bool) -> None:
    values = {OURS: 2.0, "sampled_addmm + CSR": 8.0, "torch.compile": 4.0}
    rows = [
        {"op": "op", "shape": "8/1/8", "mode": "forward", "competitor": name, "s": value}
        for name, value in values.items()
    ]
    report = Report("ops", {})
    report.against_ours(rows, "s", "time", inverse=inverse)
    column, other = ("ours_over_this", None) if inverse else ("over_ours", 1.0)
    want = [other, 0.25, 0.5] if inverse else [other, 4.0, 2.0]
    assert [row.get(column) for row in rows] == want
    rival = "strongest PyTorch form (sampled_addmm + CSR)"
    pair = f"ours over {rival}" if inverse else f"{rival} over ours"
    assert report.figures == [
        {"figure": f"op 8/1/8 forward, time: {pair}", "value": want[1], "unit": "×"}
    ]


def test_csr_passes_compute_one_gradient_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    backward = cpu.csr_diffusion_bwd

    def spy(*arguments: Any, needs_dx: bool, needs_da: bool, **rest: Any) -> Any:
        asked.append((needs_dx, needs_da))
        return backward(*arguments, needs_dx=needs_dx, needs_da=needs_da, **rest)

    monkeypatch.setattr(cpu, "csr_diffusion_bwd", spy)
    calls = csr_passes(graphs.load("random", nodes=100), 8)
    calls["csr product"]()
    calls["csr product with Aᵀ"]()
    calls["csr weight gradient"]()
    assert asked == [(True, False), (False, True)]


@pytest.mark.parametrize("competitor", tuned.COMPETITORS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.dataset)
def test_tuned_competitor_agrees(configuration: Configuration, competitor: str) -> None:
    problem = tuned.setup(configuration, graphs.load("random", nodes=300))
    function = tuned.COMPETITORS[competitor](problem)
    want = tuned.expected(problem)
    check(competitor, function, problem, want, tolerance=suite.CANCELLING)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.dataset)
def test_released_sequence_is_the_reference(configuration: Configuration) -> None:
    problem = tuned.setup(configuration, graphs.load("random", nodes=200))
    wide = problem.double()
    with gf.backend("reference"):
        out, grads = gradients(tuned.COMPETITORS[OURS](wide), wide)
    for name, value in named(wide, out, grads).items():
        assert_close(name, value, tuned.expected(problem)[name], tolerance=1e-11)


def test_tuned_graphs_are_the_papers(data_root: Path) -> None:
    sizes = {"Cora": (2485, 5069), "Photo": (7487, 119_043)}
    for name, (nodes, pairs) in sizes.items():
        configuration = tuned.BY_DATASET[name]
        graph = tuned.load_graph(configuration)
        assert (graph.num_nodes, graph.num_edges) == (nodes, 2 * pairs + nodes)
        loops = graph.edge_index()[:, 2 * pairs :]
        assert torch.equal(loops, torch.arange(nodes).repeat(2, 1))
        if configuration.self_loops != 1.0:
            assert float(graph.edge_weight[-1]) == pytest.approx(configuration.self_loops)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(machine.DoesNotFitError, match=r"needs about 1000000.0 GB, .* available"):
        machine.require_memory("a graph", 10**15)


def test_peak_memory_in_a_fresh_process() -> None:
    size = 100 * 2**20
    found = run_fresh(_fresh_tasks.peak_of_an_array, size=size)
    assert found["bytes"] == pytest.approx(size, rel=0.05)
    assert found["process_bytes"] > found["bytes"]
    with pytest.raises(RuntimeError, match="ValueError: out of luck"):
        run_fresh(_fresh_tasks.broken)


def test_short_names_of_sizes() -> None:
    assert [scaling.short(e) for e in (99_999, 60_000_000)] == ["1e5", "6e7"]


@pytest.mark.parametrize("allocator", ["keep", "system"])
def test_peers_run_with_an_allocator_that_keeps_memory(
    allocator: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = run_fresh(_fresh_tasks.fresh_pages, keep=allocator == "keep")
    share = found["fresh"] / found["all"]  # a few while the heap grows to its size
    assert share < 0.5 if allocator == "keep" else share > 0.9
    calls: list[bool] = []
    monkeypatch.setattr(machine, "keep_memory", lambda: not calls.append(True))
    monkeypatch.setitem(SUITES, "overhead", (_fresh_tasks.__name__, "nothing"))
    file = tmp_path / "found.json"
    options = ["overhead", "--json", str(file), "--allocator", allocator]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    for name in ("bench", "__main__"):  # a caller's process is left as it is
        calls.clear()
        with pytest.raises(SystemExit) if name == "__main__" else nullcontext():
            runpy.run_module("bench.__main__", run_name=name)["main"]()
        kept = name == "__main__" and allocator == "keep"
        assert bool(calls) is kept
        header = json.loads(file.read_text())["header"]
        assert header["allocator"] == ("keep" if kept else "system")


def test_it_is_a_program() -> None:
    command = [sys.executable, "-m", "bench", "nonsense"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "invalid choice: 'nonsense'" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process", "one_thread")
def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "QUICK_EDGES", (2_000, 20_000))
    code = main(["ops", "--nodes", "500", "--channels", "8", "--attention-channels", "8",
                 "--quick", "--all", "--rounds", "3", "--json", str(tmp_path / "ops.json"),
                 "--out", str(tmp_path)])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0, out
    assert "% of copy" in out
    values = json.loads((tmp_path / "ops.json").read_text())
    assert {"device", "threads", "versions", "commit", "command"} <= set(values["header"])
    assert all(row.get("median_s", row.get("peak_bytes", 0)) > 0 for row in values["rows"])
    assert not values["failed"]
    rates = {"copy_gb_per_s", "gather_gb_per_s", "multiply_add_gflop_per_s"}
    assert all(rates <= set(row) for row in values["header"]["machine"])
    figures = {figure["figure"] for figure in values["figures"]}
    assert figures >= {
        f"attention_diffusion 8/4/8 {mode}, {what}"
        for mode in ("forward", "forward+backward")
        for what in (
            "time: strongest PyTorch form (sampled_addmm + CSR) over ours",
            "peak memory above inputs: ours over strongest PyTorch form (sampled_addmm + CSR)",
        )
    }
    assert figures >= {
        "edge pass forward over 2 row gathers (k, x)",
        "csr product: MKL over ours",
        "edge passes backward: the hub's row alone on 1 thread",
    }
    assert {row["op"] for row in values["rows"]} >= {"passes", "scaling"}
    for picture in ("ops_time_per_shape", "memory_per_shape", "scaling_time_per_edge"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process", "one_thread")
def test_tuned_command_line(data_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    assert main(["tuned", "--dataset", "cora", "--rounds", "3", "--json", str(path),
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    values = json.loads(path.read_text())
    assert len(values["rows"]) == 2 * len(tuned.COMPETITORS)
    assert all(row["median_s"] > 0 for row in values["rows"])
    weighed = [row for row in values["rows"] if row["mode"] == "forward+backward"]
    assert all(0 < min(row["peak_bytes_of_runs"]) <= row["peak_bytes"] for row in weighed)
    assert [figure["figure"] for figure in values["figures"]] == [
        f"Cora (below 10,000 nodes) forward+backward, {what}: released sequence over ours"
        for what in ("time", "peak memory above inputs")
    ]
    assert (tmp_path / "tuned.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tuned", "--dataset", "digits"], "must be one of Cora, CiteSeer"),
        (["nonsense"], "invalid choice"),
        (["ops", "--graph", "torus"], "must be one of arxiv, random, local, grid"),
        (["ops", "--channels", "-1"], "at least 1"),
        (["ops", "--heads", "3"], "multiple of heads"),
        (["ops", "--graph", "arxiv", "--nodes", "10"], "size of its own"),
        (["scaling", "--nodes", "100000000000"], "needs about"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_arxiv_without_data_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(graphs.DATA_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=f"set {graphs.DATA_VARIABLE}.*--graph random"):
        graphs.load("arxiv")
    monkeypatch.setenv(graphs.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="is not there"):
        graphs.load("arxiv")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_a_gpu(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", "--quick"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert "torch sees no GPU" in line and "python -m bench gpu-report" in line
