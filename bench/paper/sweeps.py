"""Figure 3: accuracy and time on Cora over step sizes (left) and over rewired edges (right)."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.core.report import Report
from bench.core.tables import Row, print_table
from bench.paper.comparison import accuracies, having, mean_std, text
from bench.paper.figures import draw_lines
from bench.paper.jobs import Job
from grand_fast.training.configurations import configuration
from grand_fast.training.presets import Preset

DATASET, VARIANT = "Cora", "l"
SEEDS = 3
STEP_SIZES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
# The one at which the paper finds explicit Adams stable; once, for it takes 2,400 steps an epoch.
PAPER_STEP_SIZE = 0.005
KEPT = (2, 4, 8, 16, 32, 64)
TOL_SCALE = 822.0  # that the released code tuned for Cora
METHODS = ("explicit_adams", "implicit_adams", "semi_implicit_euler", "dopri5")
# Adams–Bashforth of order 4 is stable for tau |λ| below this, λ < 0; diffusion has |λ| ≤ 2 alpha.
BASHFORTH_INTERVAL = 0.3


# Title, label of the x axis, and head of its column
SWEEPS = {
    "solvers": ("solvers (figure 3, left): GRAND-l on Cora", "step size", "tau"),
    "rewiring": ("rewiring (figure 3, right): GRAND-l on Cora rewired by PageRank",
                 "K, edges kept of each node", "K"),
}  # fmt: skip


def jobs(part: str, options: argparse.Namespace) -> list[Job]:
    """Of a method that chooses its steps, one point; it is drawn at all step sizes."""
    # The loss is the paper's, so that solver or edges alone make the difference
    plain = {"early_stop": 1.0, "entropy": 0.0, "entropy_warmup": 0}
    base = replace(configuration(DATASET, VARIANT), **plain)
    points = _step_sizes(base) if part == "solvers" else _rewired(base)
    seeds = range(options.seeds or SEEDS)
    return [Job(DATASET, method, seed, preset, at=at)
            for seed in seeds for method, at, preset in points
            if seed == 0 or at != PAPER_STEP_SIZE]  # fmt: skip


def _step_sizes(base: Preset) -> list[tuple[str, float | None, Preset]]:
    points: list[tuple[str, float | None, Preset]] = [("dopri5", None, _adaptive(base))]
    for method in METHODS[:3]:
        sizes = STEP_SIZES if method != "explicit_adams" else (PAPER_STEP_SIZE, *STEP_SIZES)
        # The largest first: they are the quickest.
        points += [(method, size, _fixed(base, method, size)) for size in reversed(sizes)]
    return sorted(points, key=lambda point: -(point[1] or np.inf))


def _rewired(base: Preset) -> list[tuple[str, float | None, Preset]]:
    lines = {
        "dopri5": _adaptive(base),
        "implicit_adams": _fixed(base, "implicit_adams", 1.0),
        # The paper's step is 20 times shorter, and stable like this one.
        "explicit_adams": _fixed(base, "explicit_adams", 0.1),
    }
    return [
        (method, float(k), replace(preset, rewiring="ppr", rewiring_top_k=k))
        for k in KEPT
        for method, preset in lines.items()
    ]


def _adaptive(base: Preset) -> Preset:
    return replace(base, method="dopri5", tol_scale=TOL_SCALE)


def _fixed(base: Preset, method: str, step_size: float) -> Preset:
    # implicit_adams ends its corrections by the tolerances of dopri5
    scale = TOL_SCALE if method == "implicit_adams" else None
    return replace(base, method=method, step_size=step_size, tol_scale=scale)


def show(part: str, runs: Sequence[Row], wanted: Sequence[Job], report: Report) -> None:
    """A line for each method and point: accuracy, seconds an epoch, and what failed."""
    title, _, unit = SWEEPS[part]
    keys = sorted({(job.model, job.at) for job in wanted}, key=lambda key: (key[0], key[1] or 0))
    points = [(model, at, having(runs, model=model, at=at)) for model, at in keys]
    cells = [[model, "" if at is None else f"{at:g}", *_cells(some, part)]
             for model, at, some in points if some]  # fmt: skip
    head = ["", unit, "accuracy", "s an epoch", "evaluations", "failed"]
    head += ["stable by theory"] if part == "solvers" else []
    print_table(f"{title}; the paper prints a picture", head, cells)
    report.rows += [{"part": part, **run} for run in runs]
    best = mean_std(accuracies(having(runs, model="dopri5")))
    for model in dict.fromkeys(key[0] for key in keys):
        # a run that failed counts as 0
        every = [mean_std(0.0 if run["diverged"] else run["test_accuracy"] for run in some)
                 for name, _, some in points if name == model]  # fmt: skip
        means = [value[0] for value in every if value is not None]
        if part == "solvers" and best and means and model != "dopri5":
            name = f"solvers: {model}, lowest mean accuracy at any step size less dopri5's"
            report.figure(name, min(means) - best[0], "points")


def _cells(some: list[Row], part: str) -> list[str]:
    timed = [run for run in some if run["seconds_per_epoch"] is not None]
    failed = sum(run["diverged"] for run in some)
    cells = [
        text(mean_std(accuracies(some))),
        f"{np.median([run['seconds_per_epoch'] for run in timed]):.3f}" if timed else "",
        f"{np.median([run['nfe_forward'] or 0 for run in timed]):.0f}" if timed else "",
        f"{failed} of {len(some)}" if failed else "",
    ]
    if part == "solvers":
        cells.append(_stable(some))
    return cells


def _stable(some: list[Row]) -> str:
    """Of explicit Adams: whether theory promises stability with the alpha that was learned."""
    alphas = [run["alpha"] for run in some if run["alpha"] is not None]
    if some[0]["model"] != "explicit_adams" or not alphas:
        return ""
    limit = BASHFORTH_INTERVAL / (2 * max(alphas))
    return f"{'yes' if some[0]['at'] < limit else 'no'}: below {limit:.2f}"


def draw(part: str, runs: Sequence[Row], wanted: Sequence[Job], path: Path) -> None:
    """Accuracy and seconds an epoch over the step size or K; runs that failed as crosses."""
    panels = {"test_accuracy": "test accuracy, %", "seconds_per_epoch": "seconds an epoch"}
    title, xlabel, _ = SWEEPS[part]
    draw_lines(runs, path, panels=panels, xlabel=xlabel, title=title)
