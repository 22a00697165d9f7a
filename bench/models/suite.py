"""The suite `models`: epochs of training in tuned configurations, against the released code's."""

from __future__ import annotations

import argparse

from bench.core import fresh, machine
from bench.core.configurations import ARXIV
from bench.core.harness import interleave
from bench.core.options import MODEL_DATASETS, VARIANTS
from bench.core.plots import plot_models
from bench.core.problem import OURS
from bench.core.report import Report, Row, print_table
from bench.models.epoch import (
    OURS_CONTINUOUS,
    RELEASED,
    RELEASED_DIRECT,
    Problem,
    check_same,
    competitors,
    epoch,
    evaluations,
    peak_memory,
    require_memory,
    setup,
)
from grand_fast.data.public_files import DataError

EPILOG = f"""\
One epoch of training, forward, backward and a step of the optimiser, of GRAND-nl and GRAND-l in the
configuration that the paper's released code tuned (grand_fast/training/configurations/released),
with dropout and without evaluation. The learning rate is 0, so that every epoch is the first one.

{OURS:<30} gradient of the solver's own steps (adjoint auto)
{RELEASED:<30} the released sequence under torchdiffeq, DOPRI5 at the same tolerances, and
                               backward as its authors tuned it: through the solver on Cora, by the
                               adjoint equations at their own tolerances elsewhere
{OURS_CONTINUOUS:<30} ours by the same adjoint equations at the same tolerances
{RELEASED_DIRECT:<30} through the solver elsewhere too, where it fits into memory

First all logits are compared: at tight tolerances they must agree to rounding, at the tuned ones
they differ as two solves do. Then epochs are timed in interleaved rounds, and peak memory above
the model and its data is taken in fresh processes. ogbn-arxiv is the real graph under random
features, ours alone, RK4. Data are read from $GRAND_FAST_DATA. Try:
python -m bench models --dataset Cora --quick
"""
PICTURE = "models.png"
# What the ratios are to reach: time over ours by data set, peak memory over ours, bytes on arxiv.
TIME_BARS = {"Cora": 3.0, "PubMed": 8.0, "CoauthorCS": 8.0, "Computers": 8.0}
MEMORY_BAR = 5.0
ARXIV_BAR_BYTES = 4e9
MEMORY_RUNS = 3  # fresh processes: the most of them counts


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`.

    Raises:
        ValueError: files of a data set are missing; how to get them.
    """
    datasets = [options.dataset] if options.dataset else list(MODEL_DATASETS)
    if options.quick and not options.dataset:
        datasets = ["Cora"]
        report.skipped.append("with --quick, all data sets but Cora.")
    variants = [options.variant] if options.variant else list(VARIANTS)
    cases = [(d, v) for d in datasets for v in variants if d != ARXIV or v == "nl"]
    report.start(2 * len(cases))
    for dataset, variant in cases:
        try:
            problem = setup(dataset, variant)
        except DataError as missing:
            raise ValueError(str(missing)) from missing
        rows = _time(problem, options, report)
        _weigh(rows, 1 if options.quick else MEMORY_RUNS, report)
        report.rows += rows
        _print(rows)
    report.close()
    _figures(report)
    if options.out:
        plot_models(report.rows, options.out / PICTURE)


def _time(problem: Problem, options: argparse.Namespace, report: Report) -> list[Row]:
    """Rows of the competitors that fit and agree."""
    preset, graph = problem.preset, problem.here.graph
    rows: dict[str, Row] = {}
    calls = {}
    for name, make in competitors(problem).items():
        title = f"{problem.dataset} {preset.variant}: {name}"
        report.say(f"{title}, check")
        try:
            require_memory(problem, name)
            difference = check_same(problem, name)
        except machine.DoesNotFitError as reason:
            report.skipped.append(str(reason))
            continue
        except AssertionError as reason:
            report.failed.append(str(reason))
            continue
        model = make(problem)
        forward, backward = evaluations(model, problem)
        rows[title] = {
            "op": "epoch",
            "dataset": problem.dataset,
            "variant": preset.variant,
            "competitor": name,
            "nodes": graph.num_nodes,
            "edges": graph.num_edges,
            "nfe_forward": forward,
            "nfe_backward": backward,
            "logits_difference": difference,
        }
        calls[title] = epoch(problem, model)
    rounds = options.rounds or (3 if options.quick else 9)
    timings = interleave(calls, rounds=rounds, tick=report.say)
    report.done()
    return [row | timings[title].record() for title, row in rows.items()]


def _weigh(rows: list[Row], runs: int, report: Report) -> None:
    """Add the peak memory of an epoch: above what was there before, and of the whole process."""
    for row in rows:
        task = {key: row[key] for key in ("dataset", "variant", "competitor")}
        report.say(f"{row['dataset']} {row['variant']}: {row['competitor']}, memory")
        try:
            peaks = [fresh.run(peak_memory, **task) for _ in range(runs)]
        except RuntimeError as reason:
            report.skipped.append(f"memory of {' '.join(task.values())}: {reason}")
            continue
        row["peak_bytes"] = max(peak["bytes"] for peak in peaks)
        row["process_bytes"] = max(peak["process_bytes"] for peak in peaks)
    report.done()


def _print(rows: list[Row]) -> None:
    if not rows:
        return
    ours = next((row for row in rows if row["competitor"] == OURS), None)
    cells = [
        [
            row["competitor"],
            f"{row['median_s']:.4g} [{row['p10_s']:.4g}–{row['p90_s']:.4g}]",
            _over(row, ours, "median_s"),
            f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
            _over(row, ours, "peak_bytes"),
            f"{row['nfe_forward']} + {row['nfe_backward']}",
            f"{row['logits_difference']:.1e}",
        ]
        for row in rows
    ]
    first = rows[0]
    title = (f"{first['dataset']} GRAND-{first['variant']}, {first['nodes']:,} nodes, "
             f"{first['edges']:,} edges: an epoch")  # fmt: skip
    head = ["", "s", "over ours", "peak MB", "over ours", "evaluations", "logits differ by"]
    print_table(title, head, cells)


def _over(row: Row, ours: Row | None, key: str) -> str:
    if ours is None or row is ours or key not in row or key not in ours:
        return ""
    return f"{row[key] / ours[key]:.2f}×"


def _figures(report: Report) -> None:
    """The ratios, with the bars that they are to reach."""
    ours = {(row["dataset"], row["variant"]): row for row in report.rows
            if row["competitor"] == OURS}  # fmt: skip
    for row in report.rows:
        own = ours.get((row["dataset"], row["variant"]))
        name = f"{row['dataset']} GRAND-{row['variant']}, an epoch"
        if row["dataset"] == ARXIV:
            report.figure(f"{name}, random features", row["median_s"], "s")
            if "process_bytes" in row:
                bar = f"GB (bar {ARXIV_BAR_BYTES / 1e9:g})"
                report.figure(f"{name}, whole process", row["process_bytes"] / 1e9, bar)
        elif row["competitor"] == RELEASED and own is not None:
            bar = TIME_BARS[row["dataset"]]
            report.figure(f"{name}, time: released over ours", row["median_s"] / own["median_s"],
                          f"× (bar {bar:g})")  # fmt: skip
            if "peak_bytes" in row and "peak_bytes" in own:
                report.figure(f"{name}, peak memory: released over ours",
                              row["peak_bytes"] / own["peak_bytes"],
                              f"× (bar {MEMORY_BAR:g})")  # fmt: skip
