"""The pictures of the suite `paper`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bench.core.plots import save_chart, with_legend
from bench.core.tables import Row
from bench.paper.comparison import Comparison
from grand_fast.data.datasets import NodeData
from grand_fast.training.checkpoint import write_file

WIDEST = 3.0  # points, of the edge with the largest weight
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
    _finish(figure, path, title)


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
    _finish(figure, path, title)


def _finish(figure: Figure, path: Path, title: str) -> None:
    with_legend(figure, columns=6)
    figure.suptitle(title)
    save_chart(figure, path)


def _line(axis: Axes, own: list[Row], key: str, model: str, colour: str) -> None:
    points: dict[float | None, list[float]] = {}
    for run in sorted(own, key=lambda run: run["at"] or 0.0):
        if run[key] is not None:
            points.setdefault(run["at"], []).append(run[key] * PERCENT.get(key, 1.0))
    means = {at: float(np.mean(values)) for at, values in points.items()}
    across = means.pop(None, None)
    if across is not None:
        axis.axhline(across, linestyle="--", color=colour, label=model)
    if means:
        spread = [float(np.std(points[at])) for at in means]
        axis.errorbar(list(means), list(means.values()), yerr=spread, fmt="o-", color=colour,
                      label=model, capsize=2)  # fmt: skip
    for at in {run["at"] for run in own if run["diverged"] and run["at"] is not None}:
        where = axis.transData if at in means else axis.get_xaxis_transform()
        axis.plot(at, means.get(at, 0.02), "x", color=colour, markersize=10, transform=where,
                  label="a run failed")  # fmt: skip


@dataclass(frozen=True)
class Diffused:
    """What a model makes of the image: weights `[E]` of its edges, and the state `[N]` at T."""

    name: str
    a: NDArray[np.float32]
    state: NDArray[np.float32]


def draw_superpixels(
    segments: NDArray[np.int64], data: NodeData, found: Sequence[Diffused], path: Path
) -> None:
    """A row for each model: before, edges by weight (colour and width), after."""
    figure = Figure(figsize=(13.5, 4.8 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 3, squeeze=False)
    grey = data.x[:, 0].numpy()
    sizes = np.bincount(segments.ravel())
    sums = [np.bincount(segments.ravel(), weights=axis.ravel())
            for axis in np.indices(segments.shape)[::-1]]  # fmt: skip
    centres = np.stack(sums, axis=1) / sizes[:, None]  # [N, column and row]
    ends = centres[data.edge_index.T.numpy()]  # [E, 2 ends, x and y]
    for axes, model in zip(grid, found, strict=True):
        axes[0].imshow(grey[segments], cmap="gray", vmin=0, vmax=1)
        axes[0].set_title("superpixels")
        axes[1].imshow(grey[segments], cmap="gray", vmin=0, vmax=1, alpha=0.35)
        order = np.argsort(model.a)  # the heaviest on top
        widths = WIDEST * model.a[order] / model.a.max()
        lines = LineCollection(list(ends[order]), array=model.a[order], cmap="viridis",
                               linewidths=widths)  # fmt: skip
        axes[1].add_collection(lines)
        axes[1].set_title(f"{model.name}: weights of the edges at t = 0")
        figure.colorbar(lines, ax=axes[1], shrink=0.8)
        axes[2].imshow(model.state[segments], cmap="gray", vmin=0, vmax=1)
        axes[2].set_title(f"{model.name}: after diffusion")
        for axis in axes:
            axis.set_axis_off()
    drawn = BytesIO()
    figure.savefig(drawn, dpi=60, format="png")
    write_file(path, drawn.getvalue())
