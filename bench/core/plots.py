"""The pictures of the suites, from their rows; each takes those rows that it is about."""

from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from bench.core.problem import MODES
from bench.core.tables import Row
from grand_fast.training.checkpoint import write_file

LEGEND_COLUMNS = 4
BAR_SHARE = 0.85  # of the place of a group, that its bars take if it has all of them
COLOURS = 256  # of the palette, a quarter of the bytes; a chart has fewer, a photograph more
FLOOR = "floor: row gathers + arithmetic of projections"
PER_SHAPE = {"median_s": ("milliseconds", 1e3), "peak_bytes": ("peak above inputs, MB", 1e-6)}
# What could bound a GPU kernel, as the rows of gpu-report name it.
MODEL_BOUNDS = {
    "dram_s": "DRAM",
    "l2_s": "L2",
    "pipe_s": "busiest pipe",
    "latency_s": "latency",
    "longest_s": "longest piece",
}


def plot_time_per_edge(rows: list[Row], path: Path) -> None:
    """Lines over the number of edges, one per pass; a panel per kind of graph."""
    rows = [row for row in rows if "ns_per_edge" in row]
    kinds = _values(rows, "graph")
    figure, axes = _panels(len(kinds), same_scale=True)
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [row for row in rows if row["graph"] == kind]
        for name in _values(chosen, "competitor"):
            line = [row for row in chosen if row["competitor"] == name]
            style = "ks--" if "floor" in name else "o-"
            edges, time = ([row[key] for row in line] for key in ("edges", "ns_per_edge"))
            axis.plot(edges, time, style, label=name)
        axis.set(title=kind, xlabel="edges", ylabel="nanoseconds per edge")
        axis.set(xscale="log", yscale="log")
        _plain_numbers(axis.yaxis)
    _finish(figure, axes, path)


def plot_model(rows: list[Row], path: Path) -> None:
    """Bars per kernel, one for each thing that could bound it, the floor as a line.

    A panel per GPU and element type; of a model, so the picture says so.
    """
    rows = [row for row in rows if "model" in row]
    panels = _values(rows, "gpu", "dtype")
    figure, axes = _panels(len(panels), same_scale=True)
    for axis, panel in zip(axes, panels, strict=True):
        here = [row for row in rows if (row["gpu"], row["dtype"]) == panel]
        names = [row["kernel"].replace(" ", "\n", 1) for row in here]
        for place, row in enumerate(here):
            model = row["model"]["natural"]
            for i, (key, label) in enumerate(MODEL_BOUNDS.items()):
                at = place + (i - (len(MODEL_BOUNDS) - 1) / 2) * 0.16
                axis.bar(at, model[key] * 1e3, 0.16, color=f"C{i}", label=label)
            floor = model["floor_s"] * 1e3
            axis.hlines(floor, place - 0.4, place + 0.4, "black", label="floor of memory")
        axis.set(title=f"{' '.join(panel)}: MODEL, nothing ran", ylabel="milliseconds")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    _finish(figure, axes, path)


def plot_work_precision(rows: list[Row], path: Path) -> None:
    """Lines of error, one per method, over evaluations of f and over seconds.

    A row of panels per graph and variant.
    """
    rows = [row for row in rows if row["op"] == "precision"]
    kinds, methods = _values(rows, "graph", "variant"), _values(rows, "method")
    figure = Figure(figsize=(13.0, 4.5 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), 2, squeeze=False)
    for axes, kind in zip(grid, kinds, strict=True):
        here = [row for row in rows if (row["graph"], row["variant"]) == kind]
        for axis, key, label in zip(
            axes, ("nfe", "median_s"), ("evaluations of f", "seconds"), strict=True
        ):
            for i, method in enumerate(methods):
                line = [row for row in here if row["method"] == method]
                style = "s--" if method.startswith("torchdiffeq") else "o-"
                work, error = ([row[k] for row in line] for k in (key, "error"))
                colour = colormaps["tab20"](i)  # more methods than the cycle has colours
                axis.plot(work, error, style, color=colour, label=method, markersize=4)
            axis.set(title=f"{kind[1]} on {kind[0]}", xlabel=label, ylabel="relative error of x(T)")
            axis.set(xscale="log", yscale="log")
            _plain_numbers(axis.xaxis)
    _finish(figure, list(grid.flat), path)


def plot_time_and_memory(
    rows: list[Row], group: str, title: str, time: tuple[str, float], above: str, path: Path
) -> None:
    """Bars per group and competitor: a panel of times, and one of peaks of memory.

    Args:
        group: what a group is called, a format of its rows.
        time: a unit, and how many a second has.
        above: what stands in memory before.
    """
    rows = [row | {"group": group.format(**row)} for row in rows]
    figure, axes = _panels(2)
    names = _values(rows, "competitor")
    panels = (("median_s", *time), ("peak_bytes", f"peak above {above}, MB", 1e-6))
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        _grouped_bars(axis, [row for row in rows if key in row], "group", key, scale, names)
        axis.set(title=title, ylabel=label)
    _finish(figure, axes, path)


def plot_per_shape(rows: list[Row], key: str, path: Path) -> None:
    """Bars of `median_s` or `peak_bytes` per shape and competitor, the floor of time as a line.

    A panel for each mode.
    """
    label, scale = PER_SHAPE[key]
    rows = [row for row in rows if row["op"] == "attention_diffusion" and key in row]
    names = _values(rows, "competitor")
    figure, axes = _panels(len(MODES))
    for axis, mode in zip(axes, MODES, strict=True):
        here = [row for row in rows if row["mode"] == mode]
        for place, shape in enumerate(_values(here, "shape")):
            bars = [row for row in here if row["shape"] == shape]
            if "floor_s" in bars[0]:
                half, floor = BAR_SHARE * len(bars) / len(names) / 2, bars[0]["floor_s"] * scale
                axis.hlines(floor, place - half, place + half, "black", label=FLOOR)
        _grouped_bars(axis, here, "shape", key, scale, names)
        axis.set(title=mode, ylabel=label, xlabel="channels / heads / att. channels")
    _finish(figure, axes, path)


def _grouped_bars(
    axis: Axes, rows: list[Row], group: str, key: str, scale: float, names: list[str]
) -> None:
    """A group of bars for each value of `group`, a bar for each competitor, on a logarithm."""
    groups = _values(rows, group)
    for place, value in enumerate(groups):
        here = [row for row in rows if row[group] == value]
        width = BAR_SHARE / len(names)
        for i, row in enumerate(here):
            at = place + (i - (len(here) - 1) / 2) * width
            name = row["competitor"]
            axis.bar(at, row[key] * scale, width, color=f"C{names.index(name)}", label=name)
    axis.set(yscale="log")
    axis.set_ylim(bottom=axis.get_ylim()[0] / 2)  # or the shortest bar has no length
    size = "small" if len(groups) <= 6 else "x-small"
    axis.set_xticks(range(len(groups)), groups, fontsize=size)
    _plain_numbers(axis.yaxis)


def _values(rows: list[Row], *keys: str) -> list[Any]:
    """Each value that rows have under a key, or each tuple of values, once."""
    found = [tuple(row[key] for key in keys) for row in rows]
    return list(dict.fromkeys(value if len(keys) > 1 else value[0] for value in found))


def _panels(count: int, *, same_scale: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.5 * count, 5.0), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=same_scale)[0])


def _plain_numbers(axis: Axis) -> None:
    """A logarithmic axis with 10, 20, 30, 50, 70 instead of powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, axes: list[Axes], path: Path) -> None:
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    with_legend(figure, LEGEND_COLUMNS)
    save_chart(figure, path)


def with_legend(figure: Figure, columns: int) -> None:
    """One legend for all panels, below them, where it covers nothing."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries  # the first of each name
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", fontsize="small",
                  ncols=columns)  # fmt: skip


def save_chart(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG with a palette, making the folder if it is missing."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    picture = BytesIO()
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(picture, format="png", optimize=True)
    write_file(path, picture.getvalue())
