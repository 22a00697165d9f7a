"""The suite `memory`: peak memory above the inputs, every competitor in a process of its own."""

import argparse
from itertools import product

from bench.core import fresh, graphs
from bench.core.check import agreeing
from bench.core.plots import plot_per_shape
from bench.core.problem import MODES, PAPER_SHAPES, Mode, Shape, runner
from bench.core.report import Report
from bench.core.tables import Column, cell, print_rows
from bench.ops import bench_attention_diffusion as bench_op
from grand_fast import Graph

EPILOG = """\
Each competitor runs once on a tiny graph (kernels compile), then once on the graph asked for, in a
fresh process of its own; the peak is the kernel's VmHWM less the resident size before the call, in
which inputs and graph stand already. Linux only. Results are checked against the float64 reference
in the first process. Peers that take seconds run on the first shape only.
"""
PICTURE = "memory_per_shape.png"
COLUMNS: list[Column] = [
    ("", cell("competitor")),
    ("mode", cell("mode")),
    ("MB", cell("peak_bytes", "{:.0f}", 1e-6)),
    ("ours over it", cell("ours_over_this", "{:.3f}×")),
]


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`."""
    graph = graphs.load(options.graph, nodes=options.nodes)
    shapes = [options.shape] if options.shape else list(PAPER_SHAPES)
    if options.quick:
        shapes = shapes[:1]
    report.start(len(shapes))
    for shape in shapes:
        slow = shape == shapes[0] and not options.quick
        competitors = [c for c in bench_op.COMPETITORS if slow or not c.slow]
        problem = bench_op.setup(graph, shape)
        names = list(agreeing(problem, competitors, str(shape), report))
        measure(names, graph, shape, options, report)
    report.close()
    if options.out:
        plot_per_shape(report.rows, "peak_bytes", options.out / PICTURE)


def measure(
    names: list[str], graph: Graph, shape: Shape, options: argparse.Namespace, report: Report
) -> None:
    """The peaks of these competitors, which have been checked, on one shape."""
    rows = []
    for name, mode in product(names, MODES):
        found = fresh.peaks(
            report, f"{shape}: {name}, {mode}", peak_memory, competitor=name, mode=mode,
            shape=shape, graph=options.graph, nodes=options.nodes,
        )  # fmt: skip
        row = {"op": "attention_diffusion", "graph": options.graph, "shape": str(shape),
               "competitor": name, "mode": mode}  # fmt: skip
        rows += [row | {"peak_bytes": peak["bytes"]} for peak in found]
    report.against_ours(rows, "peak_bytes", "peak memory above inputs", inverse=True)
    report.rows += rows
    report.done()
    if rows:
        title = f"peak above inputs, d/H/d_att = {shape}, {graph}"
        print_rows(title, rows, COLUMNS)


def peak_memory(
    competitor: str, mode: Mode, shape: Shape, graph: str, nodes: int | None
) -> dict[str, float]:
    """Bytes above inputs and graph at the peak of one call; in a fresh process."""
    chosen = next(c for c in bench_op.COMPETITORS if c.name == competitor)
    tiny = bench_op.setup(graphs.load("random", nodes=fresh.TINY_NODES), shape)
    for each in MODES:
        runner(chosen.make(tiny), tiny, each)()
    problem = bench_op.setup(graphs.load(graph, nodes=nodes), shape)
    return fresh.peak(runner(chosen.make(problem), problem, mode))
