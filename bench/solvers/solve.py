"""A GRAND-nl solve, forward and backward, against torchdiffeq over PyTorch's forms of f.

And the memory that the checkpointed solve keeps a step, and whether a limit holds.
"""

import argparse
from functools import partial
from itertools import product

import numpy as np

from bench.core import fresh, machine
from bench.core.check import named, right
from bench.core.harness import interleave
from bench.core.problem import Problem, gradients, runner
from bench.core.report import Report
from bench.core.tables import Column, Row, cell, milliseconds, print_rows, ratio
from bench.solvers import problem as solves
from bench.solvers.problem import CHECKPOINT, DIRECT, RELEASED, SOLVERS, STRONGEST

STEPS = 4
KEPT_STEPS = (4, 16, 64)
QUICK_KEPT_STEPS = (4, 8, 16)
LIMIT_STATES = 28  # as bytes: of one step's backward, and some ten states beside it
BUDGET_S = 40.0  # of one competitor's rounds
# Gradients by the projections' weights are sums over nodes and stages that cancel; the largest
# error of any competitor stays below this, of the largest entry.
TOLERANCE = 1e-4
COLUMNS: list[Column] = [
    ("", cell("competitor")),
    ("ms", milliseconds),
    ("peak MB", cell("peak_bytes", "{:.0f}", 1e-6)),
]


def run(problem: Problem, options: argparse.Namespace, report: Report) -> None:
    """Check, time and weigh; one step where as many as `STEPS` do not fit into memory."""
    _measure(STEPS, (DIRECT, CHECKPOINT, STRONGEST), problem, options, report)
    if options.quick:
        report.skipped.append("with --quick, torchdiffeq over the released sequence.")
        return
    steps = _released_steps(problem, report)
    if steps is not None:
        _measure(steps, (DIRECT, CHECKPOINT, RELEASED), problem, options, report)


def _released_steps(problem: Problem, report: Report) -> int | None:
    for steps in (STEPS, 1):
        try:
            name = f"{RELEASED}, {steps} steps of RK4"
            machine.require_memory(name, SOLVERS[RELEASED].bytes_needed(problem, steps))
            return steps
        except machine.DoesNotFitError as reason:
            report.skipped.append(str(reason))
    return None


def _measure(
    steps: int, names: tuple[str, ...], problem: Problem, options: argparse.Namespace,
    report: Report,
) -> None:  # fmt: skip
    case = f"solve, {steps} steps"
    report.say(f"{case}: grand-fast in float64")
    wide = problem.double()
    want = named(wide, *gradients(SOLVERS[CHECKPOINT].make(wide, steps), wide))
    makes = {name: partial(SOLVERS[name].make, problem, steps) for name in names}
    functions = right(makes, problem, want, case, report, dict.fromkeys(want, TOLERANCE))
    calls = {name: runner(f, problem, "forward+backward") for name, f in functions.items()}
    rounds = options.rounds or (3 if options.quick else 5)
    timings = interleave(calls, rounds=rounds, budget_s=BUDGET_S, tick=report.say)
    report.done()
    common = problem.row() | {"op": "solve", "method": solves.METHOD, "steps": steps}
    rows = [common | {"competitor": name} | t.record() for name, t in timings.items()]
    for row in rows:
        peaks = fresh.peaks(
            report, row["competitor"], solves.peak_memory, solver=row["competitor"], steps=steps,
            shape=problem.shape, graph=options.graph, nodes=options.nodes,
        )  # fmt: skip
        for peak in peaks:
            row["peak_bytes"] = peak["bytes"]
    report.done()
    report.rows += rows
    _figures(rows, report)
    if rows:
        title = f"GRAND-nl, {steps} steps of RK4, forward+backward, d/H/d_att = {problem.shape}"
        print_rows(f"{title}, {problem.graph}", rows, COLUMNS)
    if options.json:  # what was measured stays, should the system kill what takes too much memory
        report.write(options.json)


def _figures(rows: list[Row], report: Report) -> None:
    ours = [row for row in rows if SOLVERS[row["competitor"]].is_ours]
    for own, row in product(ours, [row for row in rows if row not in ours]):
        name = f"GRAND-nl RK4, {own['steps']} steps, forward+backward"
        pair = f"{row['competitor']} over {own['competitor']}"
        for key, text in (("median_s", "time"), ("peak_bytes", "peak memory above inputs")):
            report.figure(f"{name}, {text}: {pair}", ratio(row, own, key), "×")


def run_kept(problem: Problem, options: argparse.Namespace, report: Report) -> None:
    """Peaks of forward+backward over the number of steps, in fresh processes; their slope."""
    state = problem.inputs["x"].numel()
    counts = QUICK_KEPT_STEPS if options.quick else KEPT_STEPS
    limit = LIMIT_STATES * 4 * state
    rows: list[Row] = []
    for steps, limit_bytes in [*((steps, None) for steps in counts), (counts[-1], limit)]:
        within = f" within {limit / 1e6:.0f} MB" if limit_bytes else ""
        report.say(f"memory of {steps} steps{within}")
        peak = fresh.run(
            solves.peak_memory, solver=CHECKPOINT, steps=steps, shape=problem.shape,
            graph=options.graph, nodes=options.nodes, memory_limit=limit_bytes,
        )["bytes"]  # fmt: skip
        rows.append({"op": "kept", "steps": steps, "peak_bytes": peak, "limit_bytes": limit_bytes})
    *peaks, limited = (row["peak_bytes"] for row in rows)
    slope = np.polyfit(counts, [peak / (4 * state) for peak in peaks], 1)[0]
    span = f"{counts[0]} to {counts[-1]} steps"
    report.figure(f"checkpoint, memory kept per RK4 step, {span}", float(slope), "N·d elements")
    report.figure(f"memory_limit, {counts[-1]} RK4 steps: peak above inputs over the limit",
                  limited / limit, "×")  # fmt: skip
    report.rows += [row | {"shape": str(problem.shape), "competitor": CHECKPOINT} for row in rows]
    report.done()
    columns: list[Column] = [
        ("steps", cell("steps")),
        ("limit MB", lambda row: cell("limit_bytes", "{:.0f}", 1e-6)(row) or "none"),
        ("peak MB", cell("peak_bytes", "{:.0f}", 1e-6)),
        ("in states of N·d", cell("peak_bytes", "{:.2f}", 1 / (4 * state))),
    ]
    print_rows(f"{CHECKPOINT}, forward+backward, above the inputs", rows, columns)
