"""`pytest bench/ops`: the files to collect, and the graph they run on."""

import os

import pytest

from bench.core import graphs
from grand_fast import Graph


def pytest_configure(config: pytest.Config) -> None:
    """Benchmarks lie in bench_<op>.py."""
    config.addinivalue_line("python_files", "bench_*.py")


@pytest.fixture(scope="session")
def graph() -> Graph:
    """GRAND_FAST_BENCH_GRAPH: a name of bench/core/graphs.py; by default random, 20,000 nodes."""
    name = os.environ.get("GRAND_FAST_BENCH_GRAPH")
    return graphs.load(name) if name else graphs.load("random", nodes=20_000)
