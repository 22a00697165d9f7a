"""Figure 2: accuracy on Cora over depth, GRAND with steps of 1 against GCN with as many layers."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from bench.core.report import Report
from bench.core.tables import Row, print_table
from bench.paper.comparison import accuracies, having, mean_std, text
from bench.paper.figures import draw_lines
from bench.paper.jobs import Job
from bench.paper.peers import peer_preset
from grand_fast.training.configurations import configuration

DATASET = "Cora"
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
JUDGED = 32  # the depth at which accuracy is to be within points of its maximum
SEEDS = 3
MODELS = ("GRAND-l", "GRAND-nl", "GCN", "GCN-residual")


def jobs(part: str, options: argparse.Namespace) -> list[Job]:
    """`T = depth` in steps of 1 for GRAND, all else as configured; as many layers for GCN."""
    result = []
    for seed in range(options.seeds or SEEDS):
        for depth, model in product(DEPTHS, MODELS):
            is_ours = model.startswith("GRAND")
            preset = configuration(DATASET, model.removeprefix("GRAND-") if is_ours else "l")
            # The time that early stopping finds would be another depth; entropy in the loss
            # makes shallow models give one answer to all.
            preset = replace(preset, method="rk4", step_size=1.0, T=float(depth), tol_scale=None,
                             early_stop=1.0, entropy=0.0, entropy_warmup=0)  # fmt: skip
            preset = preset if is_ours else peer_preset(model, preset)
            result.append(Job(DATASET, model, seed, preset, layers=depth, at=float(depth)))
    return result


def show(part: str, runs: Sequence[Row], wanted: Sequence[Job], report: Report) -> None:
    """A line for each depth; how far accuracy falls from its maximum."""
    means = {
        (model, depth): mean_std(accuracies(having(runs, model=model, at=depth)))
        for model in MODELS
        for depth in DEPTHS
    }
    cells = [[f"{depth}", *(text(means[model, depth]) for model in MODELS)] for depth in DEPTHS]
    print_table("depth (figure 2): Cora, test accuracy in percent; the paper prints a picture, and "
                "that its baselines degrade by 50 % after 4 layers",
                ["T, layers", *MODELS], cells)  # fmt: skip
    for model in MODELS:
        own = {depth: value[0] for depth in DEPTHS if (value := means[model, depth])}
        if JUDGED in own:
            name = f"depth: {model}, accuracy at {JUDGED} less its maximum"
            report.figure(name, own[JUDGED] - max(own.values()), "points")
    report.rows += [{"part": part, **run} for run in runs]


def draw(part: str, runs: Sequence[Row], wanted: Sequence[Job], path: Path) -> None:
    """Lines over depth with one standard deviation."""
    draw_lines(runs, path, panels={"test_accuracy": "test accuracy, %"},
               xlabel="T in steps of 1, or layers", title="Cora: depth")  # fmt: skip
