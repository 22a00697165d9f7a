"""The suite `tuned`: the seven configurations of the paper against the released code's sequence."""

import argparse

import numpy as np

from bench.core import fresh
from bench.core.check import check
from bench.core.configurations import BY_DATASET, CONFIGURATIONS, Configuration, load_graph
from bench.core.harness import interleave
from bench.core.plots import plot_tuned
from bench.core.problem import MODES, OURS, Function, Mode, runner
from bench.core.report import Report, Row, milliseconds, print_table
from bench.tuned.problem import COMPETITORS, RELEASED, TunedProblem, expected, peak_memory, setup

EPILOG = """\
One evaluation of the right-hand side, from the state through the projections to f, and back to the
gradients by the state and every parameter, in the configuration that the paper's released code
tuned for each data set: its real graph, widths, heads, score, normaliser, direction and source.
Features are random. Output and gradients of every competitor are checked against the released
sequence in float64; then all are timed in interleaved rounds. Peak memory above the inputs of
forward+backward follows, the median of three fresh processes each. The graphs are read from
$GRAND_FAST_DATA.
"""
PICTURE = "tuned.png"
QUICK = ("Cora", "CiteSeer", "Photo")
SMALLEST_RATED = 10_000  # nodes, below which a call is mostly overhead
MEMORY_RUNS = 3  # fresh processes
SHORT_REPEATS = 5  # calls in a row on such a graph, in each round

# These are sums over all edges and heads, or over all nodes, whose terms cancel: the released
# code's own float32 is 2e-5 and 3e-6 off there.
CANCELLING = {"dsigma": 1e-4, "dlengthscale": 1e-4} | dict.fromkeys(("dW_q", "dW_k", "db"), 1e-5)


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`."""
    chosen = CONFIGURATIONS
    if options.dataset:
        chosen = (BY_DATASET[options.dataset],)
    elif options.quick:
        chosen = tuple(BY_DATASET[name] for name in QUICK)
    rounds = options.rounds or (3 if options.quick else 9)
    report.start(len(chosen) * (1 if options.quick else 2))
    for configuration in chosen:
        names = _compare(configuration, rounds, report)
        if not options.quick:
            _weigh(configuration, names, report)
    report.close()
    if options.quick:
        report.skipped.append("with --quick, the peak memory and the larger graphs.")
    _print(report.rows)
    _figures(report)
    if options.out:
        plot_tuned(report.rows, options.out / PICTURE)


def _compare(configuration: Configuration, rounds: int, report: Report) -> list[str]:
    """Check and time the competitors in one configuration; returns those that agree."""
    dataset = configuration.dataset
    report.say(f"{dataset}: graph")
    problem = setup(configuration, load_graph(configuration))
    report.say(f"{dataset}: {RELEASED} in float64")
    want = expected(problem)
    functions = {}
    for name, make in COMPETITORS.items():
        report.say(f"{dataset}: {name}, check")
        try:
            function = make(problem)
            check(name, function, problem, want, tolerance=CANCELLING)
            functions[name] = function
        except AssertionError as difference:
            report.failed.append(f"{configuration}: {difference}")
    del want
    report.rows += _time(problem, functions, rounds, report)
    report.done()
    return list(functions)


def _time(
    problem: TunedProblem, functions: dict[str, Function], rounds: int, report: Report
) -> list[Row]:
    calls = {
        (name, mode): runner(function, problem, mode)
        for name, function in functions.items()
        for mode in MODES
    }
    dataset = problem.configuration.dataset
    by_text = {f"{dataset}: {name}, {mode}": (name, mode) for name, mode in calls}
    small = problem.graph.num_nodes <= SMALLEST_RATED
    timings = interleave(
        {text: calls[key] for text, key in by_text.items()},
        rounds=rounds,
        repeats=dict.fromkeys(by_text, SHORT_REPEATS) if small else {},
        tick=report.say,
    )
    return [
        {
            "op": "tuned",
            "dataset": dataset,
            "configuration": str(problem.configuration),
            "competitor": name,
            "mode": mode,
            "nodes": problem.graph.num_nodes,
            "edges": problem.graph.num_edges,
            **timings[text].record(),
        }
        for text, (name, mode) in by_text.items()
    ]


def _weigh(configuration: Configuration, names: list[str], report: Report) -> None:
    """Add the peak memory of forward+backward to its row: the median of some fresh processes.

    A system that takes idle pages back while a call runs makes a peak look lower, now and then.
    """
    mode: Mode = "forward+backward"
    for name in names:
        peaks = []
        for run in range(MEMORY_RUNS):
            report.say(f"{configuration.dataset}: {name}, memory {run + 1}/{MEMORY_RUNS}")
            try:
                peak = fresh.run(
                    peak_memory, dataset=configuration.dataset, competitor=name, mode=mode
                )
                peaks.append(peak["bytes"])
            except RuntimeError as reason:
                report.skipped.append(f"memory of {name}, {configuration}: {reason}")
                break
        if len(peaks) == MEMORY_RUNS:
            row = _row(report.rows, configuration.dataset, name, mode)
            row |= {"peak_bytes": float(np.median(peaks)), "peak_bytes_of_runs": peaks}
    report.done()


def _row(rows: list[Row], dataset: str, name: str, mode: Mode) -> Row:
    wanted = (dataset, name, mode)
    return next(r for r in rows if (r["dataset"], r["competitor"], r["mode"]) == wanted)


def _print(rows: list[Row]) -> None:
    for mode in MODES:
        cells = []
        here = [row for row in rows if row["mode"] == mode]
        for row in here:
            ours = [r for r in here if r["competitor"] == OURS and r["dataset"] == row["dataset"]]
            # Nothing to compare with where ours disagreed.
            time, memory = (_ratio(row, (*ours, {})[0], key) for key in ("median_s", "peak_bytes"))
            is_ours = row["competitor"] == OURS
            cells.append(
                [
                    row["configuration"] if is_ours else "",
                    f"{row['nodes']:,} / {row['edges']:,}" if is_ours else "",
                    row["competitor"],
                    milliseconds(row),
                    "" if is_ours or time is None else f"{time:.2f}×",
                    f"{row['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in row else "",
                    "" if is_ours or memory is None else f"{memory:.2f}×",
                ]
            )
        head = ["d/H/d_att", "nodes / edges", "", "ms", "over ours", "peak MB", "over ours"]
        width = len(head) if mode == "forward+backward" else len(head) - 2
        print_table(mode, head[:width], [line[:width] for line in cells])


def _ratio(row: Row, ours: Row, key: str) -> float | None:
    return row[key] / ours[key] if key in row and key in ours else None


def _figures(report: Report) -> None:
    """What the released sequence takes over what we take, forward+backward."""
    both = [row for row in report.rows if row["mode"] == "forward+backward"]
    for row in both:
        ours = [r for r in both if r["competitor"] == OURS and r["dataset"] == row["dataset"]]
        if row["competitor"] != RELEASED or not ours:
            continue
        size = "above" if row["nodes"] > SMALLEST_RATED else "below"
        where = f"{row['dataset']} ({size} {SMALLEST_RATED:,} nodes) forward+backward"
        for key, text in (("median_s", "time"), ("peak_bytes", "peak memory above inputs")):
            ratio = _ratio(row, *ours, key)
            if ratio is not None:
                report.figure(f"{where}, {text}: {RELEASED} over ours", ratio, "×")
