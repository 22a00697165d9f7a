"""The pictures of the suites, from their rows; each takes those rows that it is about."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from bench.core.problem import MODES
from bench.core.report import Row
from grand_fast.training.checkpoint import write_file

LEGEND_COLUMNS = 4
COLOURS = 256  # of the palette, a quarter of the bytes; a chart has fewer, a photograph more
FLOOR = "floor: row gathers + arithmetic of projections"
# What could bound a GPU kernel, as the rows of gpu-report name it.
MODEL_BOUNDS = {
    "dram_s": "DRAM",
    "l2_s": "L2",
    "pipe_s": "busiest pipe",
    "latency_s": "latency",
    "longest_s": "longest piece",
}


def plot_time_per_shape(rows: list[Row], path: Path) -> None:
    """Bars per shape and competitor, the floor as a line; forward and forward+backward."""
    _bars(rows, "median_s", "milliseconds", 1e3, path)


def plot_memory_per_shape(rows: list[Row], path: Path) -> None:
    """Bars of the peak above the inputs, per shape and competitor."""
    _bars(rows, "peak_bytes", "peak above inputs, MB", 1e-6, path)


def plot_time_per_edge(rows: list[Row], path: Path) -> None:
    """Lines over the number of edges, one per pass; a panel per kind of graph."""
    rows = [row for row in rows if "ns_per_edge" in row]
    kinds = list(dict.fromkeys(row["graph"] for row in rows))
    figure, axes = _panels(len(kinds), same_scale=True)
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [row for row in rows if row["graph"] == kind]
        for name in dict.fromkeys(row["competitor"] for row in chosen):
            line = [row for row in chosen if row["competitor"] == name]
            style = "ks--" if "floor" in name else "o-"
            edges, time = ([row[key] for row in line] for key in ("edges", "ns_per_edge"))
            axis.plot(edges, time, style, label=name)
        axis.set(title=kind, xlabel="edges", ylabel="nanoseconds per edge", xscale="log")
        axis.set(yscale="log")
        _plain_numbers(axis.yaxis)
    _finish(figure, axes, path)


def plot_model(rows: list[Row], path: Path) -> None:
    """Bars per kernel, one for each thing that could bound it, the floor as a line.

    A panel per GPU and element type; of a model, so the picture says so.
    """
    rows = [row for row in rows if "model" in row]
    panels = list(dict.fromkeys((row["gpu"], row["dtype"]) for row in rows))
    figure, axes = _panels(len(panels), same_scale=True)
    for axis, panel in zip(axes, panels, strict=True):
        here = [row for row in rows if (row["gpu"], row["dtype"]) == panel]
        names = []
        for place, row in enumerate(here):
            model = row["model"]["natural"]
            names.append(row["kernel"].replace(" ", "\n", 1))
            for i, (key, label) in enumerate(MODEL_BOUNDS.items()):
                at = place + (i - (len(MODEL_BOUNDS) - 1) / 2) * 0.16
                axis.bar(at, model[key] * 1e3, 0.16, color=f"C{i}", label=label)
            floor = model["floor_s"] * 1e3
            axis.hlines(floor, place - 0.4, place + 0.4, "black", label="floor of memory")
        axis.set(title=f"{' '.join(panel)}: MODEL, nothing ran", ylabel="milliseconds")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    _finish(figure, axes, path)


def plot_tuned(rows: list[Row], path: Path) -> None:
    """Bars per data set and competitor: time and peak memory of forward+backward."""
    rows = [row for row in rows if row["mode"] == "forward+backward"]
    title = "forward+backward, tuned configurations"
    _time_and_memory(rows, "dataset", title, ("milliseconds", 1e3), "inputs", path)


def plot_models(rows: list[Row], path: Path) -> None:
    """Bars per configuration and competitor: time and peak memory of an epoch."""
    rows = [row | {"group": f"{row['dataset']}\nGRAND-{row['variant']}"} for row in rows]
    title = "an epoch of training"
    _time_and_memory(rows, "group", title, ("seconds", 1.0), "model and data", path)


def plot_work_precision(rows: list[Row], path: Path) -> None:
    """Lines of error, one per method, over evaluations of f and over seconds.

    A row of panels per graph and variant.
    """
    rows = [row for row in rows if row["op"] == "precision"]
    kinds = list(dict.fromkeys((row["graph"], row["variant"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, grid = plt.subplots(
        len(kinds), 2, figsize=(13.0, 4.5 * len(kinds)), squeeze=False, layout="constrained"
    )
    for axes, kind in zip(grid, kinds, strict=True):
        here = [row for row in rows if (row["graph"], row["variant"]) == kind]
        for axis, key, label in zip(
            axes, ("nfe", "median_s"), ("evaluations of f", "seconds"), strict=True
        ):
            for i, method in enumerate(methods):
                line = [row for row in here if row["method"] == method]
                style = "s--" if method.startswith("torchdiffeq") else "o-"
                work, error = ([row[k] for row in line] for k in (key, "error"))
                # more methods than the cycle has colours
                axis.plot(work, error, style, color=plt.cm.tab20(i), label=method, markersize=4)
            axis.set(title=f"{kind[1]} on {kind[0]}", xlabel=label, ylabel="relative error of x(T)")
            axis.set(xscale="log", yscale="log")
            _plain_numbers(axis.xaxis)
    _finish(figure, list(grid.flat), path)


def plot_solve(rows: list[Row], path: Path) -> None:
    """Bars of a solve, forward+backward: time and peak memory, per number of steps."""
    rows = [
        row | {"group": f"{row['steps']} step{'s' if row['steps'] > 1 else ''} of RK4"}
        for row in rows
        if row["op"] == "solve"
    ]
    title = "GRAND-nl, forward+backward"
    _time_and_memory(rows, "group", title, ("seconds", 1.0), "inputs", path)


def _time_and_memory(
    rows: list[Row], group: str, title: str, time: tuple[str, float], above: str, path: Path
) -> None:
    """A panel of times, in a unit of which a second has so many, and one of peaks of memory."""
    figure, axes = _panels(2)
    panels = (("median_s", *time), ("peak_bytes", f"peak above {above}, MB", 1e-6))
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        _grouped_bars(axis, [row for row in rows if key in row], group, key, scale)
        axis.set(title=title, ylabel=label)
    _finish(figure, axes, path)


def _grouped_bars(axis: Axes, rows: list[Row], group: str, key: str, scale: float) -> None:
    """A group of bars for each value of `group`, a bar for each competitor, on a logarithm."""
    groups = list(dict.fromkeys(row[group] for row in rows))
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    width = 0.85 / max(len(names), 1)
    for row in rows:
        i = names.index(row["competitor"])
        at = groups.index(row[group]) + (i - (len(names) - 1) / 2) * width
        name = row["competitor"]
        axis.bar(at, row[key] * scale, width, color=f"C{i}", label=name)
    axis.set(yscale="log")
    axis.set_ylim(bottom=axis.get_ylim()[0] / 2)  # or the shortest bar has no length
    size = "small" if len(groups) <= 6 else "x-small"
    axis.set_xticks(range(len(groups)), groups, fontsize=size)
    _plain_numbers(axis.yaxis)


def _bars(rows: list[Row], key: str, label: str, scale: float, path: Path) -> None:
    rows = [row for row in rows if row["op"] == "attention_diffusion" and key in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    width = 0.85 / max(len(names), 1)
    figure, axes = _panels(len(MODES))
    for axis, mode in zip(axes, MODES, strict=True):
        for place, shape in enumerate(shapes):
            here = [row for row in rows if row["shape"] == shape and row["mode"] == mode]
            for i, row in enumerate(here):
                at = place + (i - (len(here) - 1) / 2) * width
                name = row["competitor"]
                axis.bar(at, row[key] * scale, width, color=colours[name], label=name)
            if here and "floor_s" in here[0]:
                half = len(here) * width / 2
                floor = here[0]["floor_s"] * scale
                axis.hlines(floor, place - half, place + half, "black", label=FLOOR)
        axis.set(title=mode, ylabel=label, yscale="log", xlabel="channels / heads / att. channels")
        axis.set_ylim(bottom=axis.get_ylim()[0] / 2)  # or the shortest bar has no length
        axis.set_xticks(range(len(shapes)), shapes)
        axis.set_xlim(-0.6, len(shapes) - 0.4)
        _plain_numbers(axis.yaxis)
    _finish(figure, axes, path)


def _panels(count: int, *, same_scale: bool = False) -> tuple[Any, list[Axes]]:
    figure, axes = plt.subplots(
        1, count, figsize=(6.5 * count, 5.0), squeeze=False, sharey=same_scale, layout="constrained"
    )
    return figure, list(axes[0])


def _plain_numbers(axis: Axis) -> None:
    """A logarithmic axis with 10, 20, 30, 50, 70 instead of powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _finish(figure: Any, axes: list[Axes], path: Path) -> None:
    """One legend for all panels, below them, where it covers nothing."""
    entries = {}
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", fontsize="small",
                  ncols=LEGEND_COLUMNS)  # fmt: skip
    save_chart(figure, path)
    plt.close(figure)


def save_chart(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG with a palette, making the folder if it is missing."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    picture = BytesIO()
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(picture, format="png", optimize=True)
    write_file(path, picture.getvalue())
