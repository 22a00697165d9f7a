"""`pytest bench/ops`: each competitor checked, then timed, in the form of pytest-benchmark."""

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.core import graphs
from bench.core.check import check, expected
from bench.core.problem import MODES, Mode, Shape, UnavailableError, runner
from bench.ops import bench_error_ratio, suite
from grand_fast import Graph

MODULES = {m.__name__.split("bench_")[1]: m for m in (*suite.MODULES, bench_error_ratio)}
CASES = [
    pytest.param(op, competitor, mode, id=f"{op}-{mode}-{competitor.name}")
    for op, module in MODULES.items()
    for mode in (MODES[:1] if op == "error_ratio" else MODES)
    for competitor in module.COMPETITORS
]


@pytest.fixture(scope="session")
def graph() -> Graph:
    """GRAND_FAST_BENCH_GRAPH: a name of bench/core/graphs.py; by default random, 20,000 nodes."""
    name = os.environ.get("GRAND_FAST_BENCH_GRAPH")
    return graphs.load(name) if name else graphs.load("random", nodes=20_000)


@pytest.mark.parametrize(("op", "competitor", "mode"), CASES)
def test_operator(benchmark: BenchmarkFixture, graph: Graph, op: str, competitor, mode: Mode):
    """Skip a peer that is not to be had; fail one that disagrees with the reference; time it."""
    problem = MODULES[op].setup(graph, Shape(64, 4, 64))
    try:
        function = competitor.make(problem)
    except UnavailableError as reason:
        pytest.skip(f"{competitor.name}: {reason}")
    if competitor.exact:
        check(competitor.name, function, problem, expected(problem))
    benchmark.group = f"{op} {problem.shape} {mode}"
    benchmark.extra_info |= {
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "bytes_max": problem.cost.bytes_max,
    }
    benchmark(runner(function, problem, mode))
