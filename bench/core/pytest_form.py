"""The pytest-benchmark form of a competitor: checked, then timed."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.core.check import check, expected
from bench.core.problem import Competitor, Mode, Problem, UnavailableError, runner


def run_benchmark(
    benchmark: BenchmarkFixture, problem: Problem, competitor: Competitor, mode: Mode
) -> None:
    """Skip a peer that is not to be had; fail one that disagrees with the reference; time it."""
    try:
        function = competitor.make(problem)
    except UnavailableError as reason:
        pytest.skip(f"{competitor.name}: {reason}")
    if competitor.exact:
        check(competitor.name, function, problem, expected(problem))
    benchmark.group = f"{problem.op} {problem.shape} {mode}"
    benchmark.extra_info |= {
        "nodes": problem.graph.num_nodes,
        "edges": problem.graph.num_edges,
        "bytes_max": problem.cost.bytes_max,
    }
    benchmark(runner(function, problem, mode))
