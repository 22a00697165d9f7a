"""A GRAND-nl solve, forward and backward, against torchdiffeq over PyTorch's forms of f.

And the memory that the checkpointed solve keeps a step, and whether a limit holds.
"""

import argparse
from typing import NamedTuple

import numpy as np

from bench.core import fresh, machine
from bench.core.check import check, named
from bench.core.harness import interleave
from bench.core.problem import Problem, gradients, runner
from bench.core.report import Report, Row, milliseconds, print_table
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


class _Case(NamedTuple):
    steps: int
    names: tuple[str, ...]


def run(problem: Problem, options: argparse.Namespace, report: Report) -> None:
    """Check, time and weigh; one step where as many as `STEPS` do not fit into memory."""
    _measure(_Case(STEPS, (DIRECT, CHECKPOINT, STRONGEST)), problem, options, report)
    if options.quick:
        report.skipped.append("with --quick, torchdiffeq over the released sequence.")
        return
    steps = _released_steps(problem, report)
    if steps is not None:
        _measure(_Case(steps, (DIRECT, CHECKPOINT, RELEASED)), problem, options, report)


def _released_steps(problem: Problem, report: Report) -> int | None:
    for steps in (STEPS, 1):
        try:
            name = f"{RELEASED}, {steps} steps of RK4"
            machine.require_memory(name, SOLVERS[RELEASED].bytes_needed(problem, steps))
            return steps
        except machine.DoesNotFitError as reason:
            report.skipped.append(str(reason))
    return None


def _measure(case: _Case, problem: Problem, options: argparse.Namespace, report: Report) -> None:
    steps, names = case
    rounds = options.rounds or (3 if options.quick else 5)
    rows = _time(problem, steps, _agreeing(problem, steps, names, report), rounds, report)
    report.done()
    _weigh(rows, problem, options, report)
    report.done()
    report.rows += rows
    _figures(rows, report)
    _print(rows, problem)
    if options.json:  # what was measured stays, should the system kill what takes too much memory
        report.write(options.json)


def _agreeing(problem: Problem, steps: int, names: tuple[str, ...], report: Report) -> list[str]:
    """Those whose state and gradients are those of our checkpointed solve in float64."""
    report.say(f"{steps} steps: grand-fast in float64")
    wide = problem.double()
    want = named(wide, *gradients(SOLVERS[CHECKPOINT].make(wide, steps), wide))
    agreeing = []
    for name in names:
        report.say(f"{steps} steps: {name}, check")
        try:
            function = SOLVERS[name].make(problem, steps)
            check(name, function, problem, want, tolerance=dict.fromkeys(want, TOLERANCE))
            agreeing.append(name)
        except AssertionError as difference:
            report.failed.append(f"solve, {steps} steps: {difference}")
    return agreeing


def _time(problem: Problem, steps: int, names: list[str], rounds: int, report: Report) -> list[Row]:
    calls = {
        name: runner(SOLVERS[name].make(problem, steps), problem, "forward+backward")
        for name in names
    }
    timings = interleave(calls, rounds=rounds, budget_s=BUDGET_S, tick=report.say)
    return [
        {
            "op": "solve",
            "competitor": name,
            "method": solves.METHOD,
            "steps": steps,
            "shape": str(problem.shape),
            "nodes": problem.graph.num_nodes,
            "edges": problem.graph.num_edges,
            **timings[name].record(),
        }
        for name in names
    ]


def _weigh(rows: list[Row], problem: Problem, options: argparse.Namespace, report: Report) -> None:
    for row in rows:
        report.say(f"{row['steps']} steps: {row['competitor']}, memory")
        try:
            row["peak_bytes"] = fresh.run(
                solves.peak_memory, solver=row["competitor"], steps=row["steps"],
                shape=problem.shape, graph=options.graph, nodes=options.nodes,
            )["bytes"]  # fmt: skip
        except RuntimeError as reason:
            report.skipped.append(f"memory of {row['competitor']}: {reason}")


def _figures(rows: list[Row], report: Report) -> None:
    ours = [row for row in rows if SOLVERS[row["competitor"]].is_ours]
    for own in ours:
        for row in rows:
            if row in ours:
                continue
            pair = f"{row['competitor']} over {own['competitor']}"
            name = f"GRAND-nl RK4, {own['steps']} steps, forward+backward"
            report.figure(f"{name}, time: {pair}", row["median_s"] / own["median_s"], "×")
            if "peak_bytes" in row and "peak_bytes" in own:
                ratio = row["peak_bytes"] / own["peak_bytes"]
                report.figure(f"{name}, peak memory above inputs: {pair}", ratio, "×")


def _print(rows: list[Row], problem: Problem) -> None:
    cells = [
        [
            row["competitor"],
            milliseconds(row),
            f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
        ]
        for row in rows
    ]
    if rows:
        title = f"GRAND-nl, {rows[0]['steps']} steps of RK4, forward+backward, d/H/d_att = "
        print_table(f"{title}{problem.shape}, {problem.graph}", ["", "ms", "peak MB"], cells)


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
    cells = [
        [
            str(row["steps"]),
            f"{row['limit_bytes'] / 1e6:.0f}" if row["limit_bytes"] else "none",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes'] / (4 * state):.2f}",
        ]
        for row in rows
    ]
    head = ["steps", "limit MB", "peak MB", "in states of N·d"]
    print_table(f"{CHECKPOINT}, forward+backward, above the inputs", head, cells)
