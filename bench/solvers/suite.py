"""The suite `solvers`: work–precision, the solvers' own part of a step, a whole solve, memory."""

import argparse

from bench.core import graphs
from bench.core.plots import plot_time_and_memory, plot_work_precision
from bench.core.problem import PAPER_SHAPES
from bench.core.report import Report
from bench.solvers import precision, solve, step
from bench.solvers.problem import setup

EPILOG = """\
Four parts, of which --part chooses one:

step       what a step of RK4 and an attempt of DOPRI5 cost where f is only a copy of the state:
           the solver's own part, against torchdiffeq's and, where it is installed, torchode's.
solve      GRAND-nl, 4 steps of RK4, forward+backward to the gradients by state, weights and biases:
           ours, direct and checkpoint, against torchdiffeq over the strongest form of f in PyTorch
           and over the sequence of GRAND's released code; that one with a single step where four do
           not fit into memory. Then the peak memory of each in a fresh process.
kept       peak memory of the checkpointed solve over 4 to 64 steps, and under memory_limit.
precision  error against evaluations of f and against seconds, every method, linear (GRAND-l) and
           nonlinear (GRAND-nl), on Cora ($GRAND_FAST_DATA) and on --graph, against a float64
           solution with tight tolerances, which a second method confirms.

Everything is checked before it is timed, and timed in interleaved rounds. Try:
python -m bench solvers --nodes 20000 --quick
"""
RUNS = {"step": step.run, "solve": solve.run, "kept": solve.run_kept, "precision": precision.run}


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`."""
    steps = {"step": 4, "solve": 2 if options.quick else 4, "kept": 1, "precision": 4}
    parts = [options.part] if options.part else list(RUNS)
    graph = graphs.load(options.graph, nodes=options.nodes)
    problem = setup(graph, options.shape or PAPER_SHAPES[0])
    report.start(sum(steps[part] for part in parts))
    for part in parts:
        RUNS[part](problem, options, report)
    report.close()
    if options.out and "precision" in parts:
        plot_work_precision(report.rows, options.out / "solvers_work_precision.png")
    if options.out and "solve" in parts:
        rows = [row for row in report.rows if row["op"] == "solve"]
        group, title = "{steps} step(s) of RK4", "GRAND-nl, forward+backward"
        plot_time_and_memory(rows, group, title, ("seconds", 1.0), "inputs",
                             options.out / "solvers_solve.png")  # fmt: skip
