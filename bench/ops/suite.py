"""The suite `ops`: every operator against its peers and against the floor of memory."""

import argparse
from importlib import import_module
from types import ModuleType

from bench.core import floor, graphs, machine
from bench.core.check import agreeing
from bench.core.harness import interleave
from bench.core.plots import plot_per_shape
from bench.core.problem import PAPER_SHAPES, Function, Problem, Shape, runners
from bench.core.report import Report
from bench.core.tables import BOTH_TIMES, Column, Row, both_modes, cell, print_table, timed_rows
from bench.ops import base, memory, passes, scaling
from grand_fast import Graph

EPILOG = """\
For each shape, output and gradients of every competitor are checked against the float64 reference;
then all are timed in interleaved rounds, forward and forward+backward apart. Without --channels,
--heads and --attention-channels there are six shapes, among them those that
the paper tuned. Peers that take seconds run on the first shape only.

Times are milliseconds: median [10th-90th percentile]. GB/s are the bytes of the forward operator,
no row reused, over its time; caches can lift them above the copy bandwidth. The floor is the time
to read the rows that the edges name, doing nothing with them, and of the projections' arithmetic
at the machine's multiply-add peak; of stage_update, the time of a copy of as many bytes.

Unless --quick, the peak memory of the first shape follows, as `memory` measures it. --all adds that
of the other shapes, and the suite `scaling`.

With --base COMMIT nothing of that: the working tree, as it is, against another commit. The base is
checked out into a temporary worktree; each tree runs in a process of its own, on the same numbers.
Outputs and gradients of both are compared, then they take turns. The ratio is the tree's time over
the base's: the median over the rounds [10th-90th percentile]. Against itself, `--base HEAD`, the
spread says what this machine cannot tell apart.
"""
# All shapes are of the first
OPERATORS = ("attention_diffusion", "attention_product", "csr_diffusion", "edge_attention",
             "edge_softmax", "spmm", "stage_update")  # fmt: skip
MODULES = tuple(import_module(f"bench.ops.bench_{operator}") for operator in OPERATORS)
COLUMNS: list[Column] = [
    *BOTH_TIMES,
    ("GB/s", cell("gb_per_s", "{:.1f}")),
    ("% of copy", cell("copy_percent", "{:.0f}")),
    ("first call s", cell("first_call_s", "{:.2f}")),
]


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`."""
    if options.base and (options.all or options.out):
        raise ValueError("base: goes with neither --all nor --out: it compares, and draws nothing.")
    graph = graphs.load(options.graph, nodes=options.nodes)
    if options.base:
        shape = options.shape or PAPER_SHAPES[0]
        machine.require_memory(f"ops {shape}", 2 * bytes_needed(graph, shape))
        base.run(graph, shape, options, report)
        return
    shapes = [options.shape] if options.shape else list(PAPER_SHAPES)
    if options.quick:
        shapes = shapes[:1]
        report.skipped.append("with --quick, all peers that take seconds, and the first call.")
    for shape in shapes:
        machine.require_memory(f"ops {shape}", bytes_needed(graph, shape))
    if options.all:
        scaling.require_memory(options)
    problems = [(MODULES[0], shape) for shape in shapes]
    problems += [(module, shapes[0]) for module in MODULES[1:]]
    rounds = options.rounds or (3 if options.quick else 9)
    weighed = shapes if options.all else shapes[: 0 if options.quick else 1]
    report.start(len(problems) + (1 if options.quick else 2) + len(weighed))
    names = {}
    for module, shape in problems:
        slow = shape == shapes[0] and not options.quick
        names[module, shape] = _compare(module, graph, shape, slow, rounds, report)
    passes.run(graph, shapes[0], rounds, report, quick=options.quick)
    for shape in weighed:
        memory.measure(names[MODULES[0], shape], graph, shape, options, report)
    report.close()
    if options.all:
        scaling.measure(options, report)
    if options.out:
        plot_per_shape(report.rows, "median_s", options.out / "ops_time_per_shape.png")
        if weighed:
            plot_per_shape(report.rows, "peak_bytes", options.out / memory.PICTURE)


def bytes_needed(graph: Graph, shape: Shape) -> int:
    """Of the check, in float32 and float64, or of the tables of all passes, if that is more."""
    d, d_att = shape.channels, shape.attention_channels
    check = (3 * d + 4 * d_att) * (4 + 8)
    all_passes = (16 * d + 7 * d_att) * 4
    building = graph.num_edges * graphs.BUILDING_BYTES
    return graph.num_nodes * max(check, all_passes) + building + 2 * machine.COPY_BYTES


def _compare(
    module: ModuleType, graph: Graph, shape: Shape, slow: bool, rounds: int, report: Report
) -> list[str]:
    """Check, time and print the competitors on one shape; returns those that agree."""
    problem = module.setup(graph, shape)
    competitors = [c for c in module.COMPETITORS if slow or not c.slow]
    found = agreeing(problem, competitors, f"{problem.op} {shape}", report)
    functions = {name: function for name, (function, _) in found.items()}
    rows = _time(problem, functions, rounds, report)
    for row in rows:
        row |= {"graph": report.header["graph"], "first_call_s": found[row["competitor"]][1]}
    report.against_ours(rows, "median_s", "time", inverse=False)
    report.rows += rows
    report.done()
    _print(problem, rows, report.header["machine"][-1])
    return list(found)


def _time(
    problem: Problem, functions: dict[str, Function], rounds: int, report: Report
) -> list[Row]:
    calls, beside = runners(functions, problem), floor.calls(problem)
    timings = interleave(calls | beside, rounds=rounds, tick=report.say)
    of_machine = {name: timings.pop(name) for name in beside}
    rates, floors = floor.rates(problem, of_machine), floor.seconds(problem, of_machine)
    report.header.setdefault("machine", []).append(
        {"shape": str(problem.shape), "op": problem.op} | rates
        | {f"{name}_s": timing.median for name, timing in of_machine.items()}
    )  # fmt: skip
    rows = timed_rows(timings, **problem.row())
    for row in rows:
        row["floor_s"] = floors[row["mode"]]
        if row["mode"] == "forward":
            row["gb_per_s"] = problem.cost.bytes_max / row["median_s"] / 1e9
            row["copy_percent"] = 100 * row["gb_per_s"] / rates["copy_gb_per_s"]
    return rows


def _print(problem: Problem, rows: list[Row], rates: dict[str, float]) -> None:
    lines = [[read(row) for _, read in COLUMNS] for row in both_modes(rows)]
    if rows:
        floors = {row["mode"]: f"{row['floor_s'] * 1e3:.1f}" for row in rows}
        lines.append(["floor", floors["forward"], "", floors["forward+backward"], "", "", "", ""])
    title = f"{problem.op}, d/H/d_att = {problem.shape}, {problem.graph}"
    print_table(title, [head for head, _ in COLUMNS], lines)
    gather = f"row gather {rates['gather_gb_per_s']:.0f} GB/s, " if problem.gathers else ""
    print(
        f"The machine in this run: copy {rates['copy_gb_per_s']:.0f} GB/s, {gather}"
        f"multiply-adds {rates['multiply_add_gflop_per_s']:.0f} GFLOP/s.",
        flush=True,
    )
