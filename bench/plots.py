"""The pictures of the suites, from their rows; `python -m bench.plots` redraws them from JSON."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.problem import MODES
from bench.report import Row


def plot_time_per_shape(rows: list[Row], path: Path) -> None:
    """Bars per shape and competitor, the floor as a line; forward and forward+backward."""
    _bars(rows, "median_s", "seconds", 1.0, path)


def plot_memory_per_shape(rows: list[Row], path: Path) -> None:
    """Bars of the peak above the inputs, per shape and competitor."""
    _bars(rows, "peak_bytes", "peak above inputs, GB", 1e-9, path)


def plot_time_per_edge(rows: list[Row], path: Path) -> None:
    """Lines over the number of edges, one per pass; a panel per kind of graph."""
    kinds = list(dict.fromkeys(row["graph"] for row in rows))
    figure, axes = _panels(len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [row for row in rows if row["graph"] == kind]
        for name in dict.fromkeys(row["competitor"] for row in chosen):
            line = [row for row in chosen if row["competitor"] == name]
            style = "k--" if "floor" in name else "o-"
            edges, time = ([row[key] for row in line] for key in ("edges", "ns_per_edge"))
            axis.plot(edges, time, style, label=name)
        axis.set(title=kind, xlabel="edges", ylabel="nanoseconds per edge", xscale="log")
        axis.set_ylim(bottom=0)
    _finish(figure, axes, path)


def _bars(rows: list[Row], key: str, label: str, scale: float, path: Path) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    width = 0.8 / max(len(names), 1)
    figure, axes = _panels(len(MODES))
    for axis, mode in zip(axes, MODES, strict=True):
        for place, name in enumerate(names):
            values = {r["shape"]: r for r in rows if r["competitor"] == name and r["mode"] == mode}
            at = [shapes.index(shape) + (place + 0.5) * width - 0.4 for shape in values]
            axis.bar(at, [r[key] * scale for r in values.values()], width, label=name)
        floors = {r["shape"]: r["floor_s"] for r in rows if r["mode"] == mode and "floor_s" in r}
        for place, (shape, floor) in enumerate(floors.items()):
            middle = shapes.index(shape)
            text = "floor: row gathers + projections" if place == 0 else None
            axis.hlines(floor, middle - 0.4, middle + 0.4, "black", label=text)
        axis.set(title=mode, ylabel=label, yscale="log", xlabel="channels / heads / att. channels")
        axis.set_xticks(range(len(shapes)), shapes)
    _finish(figure, axes, path)


def _panels(count: int) -> tuple[Any, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(6.5 * count, 4.5), squeeze=False)
    return figure, list(axes[0])


def _finish(figure: Any, axes: list[Axes], path: Path) -> None:
    axes[0].legend(fontsize="small")
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
