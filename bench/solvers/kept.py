"""Memory that the checkpointed solve keeps a step, and whether a limit holds."""

import argparse

import numpy as np

from bench.core import fresh
from bench.core.problem import Problem
from bench.core.progress import Progress
from bench.core.report import Report, Row, print_table
from bench.solvers.problem import CHECKPOINT

STEPS = (4, 16, 64)
QUICK_STEPS = (4, 8, 16)
LIMIT_STATES = 28  # as bytes: of one step's backward, and some ten states beside it


def run(problem: Problem, options: argparse.Namespace, report: Report, progress: Progress) -> None:
    """Peaks of forward+backward over the number of steps, in fresh processes; their slope."""
    state = problem.inputs["x"].numel()
    task = {"solver": CHECKPOINT, "shape": problem.shape, "graph": options.graph,
            "nodes": options.nodes}  # fmt: skip
    counts = QUICK_STEPS if options.quick else STEPS
    rows: list[Row] = []
    for steps in counts:
        progress.say(f"memory of {steps} steps")
        peak = fresh.run("solve_peak_memory", task | {"steps": steps})["bytes"]
        rows.append({"op": "kept", "steps": steps, "peak_bytes": peak, "limit_bytes": None})
    slope = np.polyfit(counts, [row["peak_bytes"] / (4 * state) for row in rows], 1)[0]
    span = f"{counts[0]} to {counts[-1]} steps"
    report.figure(f"checkpoint, memory kept per RK4 step, {span}", float(slope), "N·d elements")
    limit = LIMIT_STATES * 4 * state
    progress.say(f"memory of {counts[-1]} steps within {limit / 1e6:.0f} MB")
    limited = task | {"steps": counts[-1], "memory_limit": limit}
    peak = fresh.run("solve_peak_memory", limited)["bytes"]
    rows.append({"op": "kept", "steps": counts[-1], "peak_bytes": peak, "limit_bytes": limit})
    report.figure(f"memory_limit, {counts[-1]} RK4 steps: peak above inputs over the limit",
                  peak / limit, "×")  # fmt: skip
    report.rows += [row | {"shape": str(problem.shape), "competitor": CHECKPOINT} for row in rows]
    progress.done()
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
