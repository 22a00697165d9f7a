"""The pictures of the suite `paper`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.core.plots import save_chart
from bench.core.report import Row
from bench.paper.comparison import Comparison

PERCENT = {"test_accuracy": 100.0}  # units of what is drawn as it is not stored


def draw_accuracies(found: Sequence[Comparison], path: Path, *, title: str) -> None:
    """A panel per data set, a row per model: the paper's mean and ours, one standard deviation."""
    datasets = list(dict.fromkeys(item.dataset for item in found))
    figure = Figure(figsize=(4.2 * len(datasets), 4.5), layout="constrained")
    grid = figure.subplots(1, len(datasets), squeeze=False)
    for axis, dataset in zip(grid[0], datasets, strict=True):
        here = [item for item in found if item.dataset == dataset][::-1]
        for place, item in enumerate(here):
            for value, shift, colour, label in (
                (item.paper, 0.15, "C7", "paper"),
                (item.ours, -0.15, "C0", "ours"),
            ):
                if value is not None:
                    axis.errorbar(value[0], place + shift, xerr=value[1], fmt="o", color=colour,
                                  label=label, capsize=2)  # fmt: skip
        axis.set_yticks(range(len(here)), [item.model for item in here], fontsize="small")
        axis.set(title=dataset, xlabel="test accuracy, %")
        axis.grid(axis="x", alpha=0.3)
    _finish(figure, list(grid[0]), path, title)


def draw_lines(
    runs: Sequence[Row], path: Path, *, panels: Mapping[str, str], xlabel: str, title: str
) -> None:
    """A panel for each key of `panels`, with its label; a line for each model over `at`.

    Means with one standard deviation over the seeds. Points with a failed run are crosses, at the
    bottom where no run gave a value; a model without `at` is a dashed line across.
    """
    figure = Figure(figsize=(6.0 * len(panels), 4.5), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    models = list(dict.fromkeys(run["model"] for run in runs))
    for axis, (key, ylabel) in zip(grid[0], panels.items(), strict=True):
        for index, model in enumerate(models):
            own = [run for run in runs if run["model"] == model]
            _line(axis, own, key, model, f"C{index}")
        axis.set_xscale("log", base=2)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if key not in PERCENT:
            axis.set_yscale("log")
        places = sorted({run["at"] for run in runs if run["at"] is not None})
        axis.set_xticks(places, [f"{place:g}" for place in places], fontsize="small")
        axis.grid(alpha=0.3)
    _finish(figure, list(grid[0]), path, title)


def _line(axis: Axes, own: list[Row], key: str, model: str, colour: str) -> None:
    points: dict[float | None, list[float]] = {}
    for run in sorted(own, key=lambda run: run["at"] or 0.0):
        values = points.setdefault(run["at"], [])
        if run[key] is not None:
            values.append(run[key] * PERCENT.get(key, 1.0))
    if None in points:
        values = points.pop(None)
        if values:
            axis.axhline(float(np.mean(values)), linestyle="--", color=colour, label=model)
    drawn = {at: values for at, values in points.items() if values}
    if drawn:
        means = [float(np.mean(values)) for values in drawn.values()]
        spread = [float(np.std(values)) for values in drawn.values()]
        axis.errorbar(list(drawn), means, yerr=spread, fmt="o-", color=colour, label=model,
                      capsize=2)  # fmt: skip
    for at in {run["at"] for run in own if run["diverged"] and run["at"] is not None}:
        height = float(np.mean(drawn[at])) if at in drawn else None
        where = axis.transData if height is not None else axis.get_xaxis_transform()
        axis.plot(at, 0.02 if height is None else height, "x", color=colour, markersize=10,
                  transform=where, label="a run failed")  # fmt: skip


def _finish(figure: Figure, axes: list[Axes], path: Path, title: str) -> None:
    """One legend below all panels, the first of each name."""
    entries: dict[str, object] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", fontsize="small",
                  ncols=6)  # fmt: skip
    figure.suptitle(title)
    save_chart(figure, path)
