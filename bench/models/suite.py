"""The suite `models`: epochs of training in tuned configurations, against the released code's."""

import argparse

from bench.core import fresh, machine
from bench.core.configurations import ARXIV
from bench.core.harness import interleave
from bench.core.options import MODEL_DATASETS, VARIANTS
from bench.core.plots import plot_time_and_memory
from bench.core.problem import OURS
from bench.core.report import Report
from bench.core.tables import Column, Row, add_ratios, cell, print_rows
from bench.models import layers
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
features, ours alone, RK4.

With --layer, in place of all that: PyG's layer by that name against ours with the same weights, on
the graphs of PubMed and ogbn-arxiv, everything differentiated.
Data are read from $GRAND_FAST_DATA. Try:
python -m bench models --dataset Cora --quick
"""
PICTURE = "models.png"
# What the ratios are to reach: time over ours by data set, peak memory over ours, bytes on arxiv.
TIME_BARS = {"Cora": 3.0, "PubMed": 8.0, "CoauthorCS": 8.0, "Computers": 8.0}
MEMORY_BAR = 5.0
ARXIV_BAR_BYTES = 4e9
MEMORY_RUNS = 3  # fresh processes: the most of them counts
COLUMNS: list[Column] = [
    ("", cell("competitor")),
    ("s", lambda row: "{median_s:.4g} [{p10_s:.4g}–{p90_s:.4g}]".format(**row)),
    ("over ours", cell("time_over_ours", "{:.2f}×")),
    ("peak MB", cell("peak_bytes", "{:.0f}", 1e-6)),
    ("over ours", cell("peak_over_ours", "{:.2f}×")),
    ("evaluations", lambda row: "{nfe_forward} + {nfe_backward}".format(**row)),
    ("logits differ by", cell("logits_difference", "{:.1e}")),
]


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`.

    Raises:
        ValueError: files of a data set are missing; how to get them.
    """
    if options.layer:
        return layers.run(options, report)
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
        add_ratios(rows)
        report.rows += rows
        if rows:
            title = "{dataset} GRAND-{variant}, {nodes:,} nodes, {edges:,} edges: an epoch"
            print_rows(title.format(**rows[0]), rows, COLUMNS)
    report.close()
    _figures(report)
    if options.out:
        group, above = "{dataset}\nGRAND-{variant}", "model and data"
        plot_time_and_memory(report.rows, group, "an epoch of training", ("seconds", 1.0), above,
                             options.out / PICTURE)  # fmt: skip


def _time(problem: Problem, options: argparse.Namespace, report: Report) -> list[Row]:
    """Rows of the competitors that fit and agree."""
    graph = problem.here.graph
    common = {"op": "epoch", "dataset": problem.dataset, "variant": problem.preset.variant,
              "nodes": graph.num_nodes, "edges": graph.num_edges}  # fmt: skip
    rows, calls = [], {}
    for name, make in competitors(problem).items():
        title = f"{problem.dataset} {problem.preset.variant}: {name}"
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
        rows.append(common | {"competitor": name, "nfe_forward": forward, "nfe_backward": backward,
                              "logits_difference": difference})  # fmt: skip
        calls[title] = epoch(problem, model)
    rounds = options.rounds or (3 if options.quick else 9)
    timings = interleave(calls, rounds=rounds, tick=report.say)
    report.done()
    return [row | timing.record() for row, timing in zip(rows, timings.values(), strict=True)]


def _weigh(rows: list[Row], runs: int, report: Report) -> None:
    """Add the peak memory of an epoch: above what was there before, and of the whole process."""
    for row in rows:
        task = {key: row[key] for key in ("dataset", "variant", "competitor")}
        peaks = fresh.peaks(report, " ".join(task.values()), peak_memory, runs=runs, **task)
        if peaks:
            row["peak_bytes"] = max(peak["bytes"] for peak in peaks)
            row["process_bytes"] = max(peak["process_bytes"] for peak in peaks)
    report.done()


def _figures(report: Report) -> None:
    """The ratios, with the bars that they are to reach."""
    for row in report.rows:
        name = f"{row['dataset']} GRAND-{row['variant']}, an epoch"
        if row["dataset"] == ARXIV:
            report.figure(f"{name}, random features", row["median_s"], "s")
            if "process_bytes" in row:
                bar = f"GB (bar {ARXIV_BAR_BYTES / 1e9:g})"
                report.figure(f"{name}, whole process", row["process_bytes"] / 1e9, bar)
        elif row["competitor"] == RELEASED:
            for key, text, bar in (("time", "time", TIME_BARS[row["dataset"]]),
                                   ("peak", "peak memory", MEMORY_BAR)):  # fmt: skip
                figure = f"{name}, {text}: released over ours"
                report.figure(figure, row[f"{key}_over_ours"], f"× (bar {bar:g})")
