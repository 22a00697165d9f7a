"""PyG's attention layers against ours by the same names: `python -m bench models --layer NAME`."""

import argparse
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch_geometric.nn
from torch import Tensor
from torch.func import functional_call

from bench.core import fresh, graphs
from bench.core.check import right
from bench.core.configurations import ARXIV, BY_DATASET, load_graph
from bench.core.harness import interleave
from bench.core.problem import OURS, Differentiated, Function, Mode, Shape, runner, runners
from bench.core.report import Report
from bench.core.tables import Column, Row, add_ratios, cell, milliseconds, print_rows, timed_rows
from grand_fast import Graph, nn
from grand_fast.graph import cached_graph

# Hidden layers, as wide as their input, which needs a gradient: GAT's own, and a wide one, whose
# projections take longer than its edges where there are few of these
_GAT, _WIDE = Shape(64, 8, 64), Shape(128, 4, 128)
SHAPES = {"PubMed": (_GAT, _WIDE), ARXIV: (_WIDE,)}
PYG = "PyG"
PACKAGES: dict[str, ModuleType] = {OURS: nn, PYG: torch_geometric.nn}
TIME_BAR, MEMORY_BAR = 2.5, 4.0
TOLERANCE = 1e-5
MEMORY_RUNS = 3  # fresh processes: the most of them counts
COLUMNS: list[Column] = [
    ("", cell("competitor")),
    ("mode", cell("mode")),
    ("ms", milliseconds),
    ("over ours", cell("time_over_ours", "{:.2f}×")),
    ("peak MB", cell("peak_bytes", "{:.0f}", 1e-6)),
    ("over ours", cell("peak_over_ours", "{:.2f}×")),
]


def setup(layer: str, shape: Shape, graph: Graph) -> tuple[Differentiated, dict[str, Function]]:
    """Random features and weights, all differentiated, and both layers as functions of them."""
    torch.manual_seed(0)
    edges, n = graph.edge_index(), graph.num_nodes
    graphs.prepare(cached_graph(edges, n, one_loop_each=layer == "GATConv"))
    layers = {
        name: getattr(package, layer)(shape.channels, shape.d_k, shape.heads)
        for name, package in PACKAGES.items()
    }
    inputs = {"x": torch.randn(n, shape.channels)}
    inputs |= {name: p.detach() for name, p in layers[PYG].named_parameters()}
    names = list(inputs)[1:]

    def call(module: Any, x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, weights, strict=True)), (x, edges))

    functions = {name: partial(call, module) for name, module in layers.items()}
    return Differentiated(inputs, torch.randn(n, shape.attention_channels)), functions


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`."""
    datasets = [options.dataset] if options.dataset else list(SHAPES)
    cases = [(dataset, shape) for dataset in datasets for shape in SHAPES.get(dataset, (_WIDE,))]
    report.start(2 * len(cases))
    report.compared_with = "PyG's layer"
    for dataset, shape in cases:
        rows = _time(options.layer, dataset, shape, options, report)
        for row in rows:
            task = {key: row[key] for key in ("layer", "dataset", "competitor", "mode")}
            runs = 1 if options.quick else MEMORY_RUNS
            peaks = fresh.peaks(
                report, " ".join(task.values()), peak_memory, runs=runs, shape=shape, **task
            )
            if peaks:
                row["peak_bytes"] = max(peak["bytes"] for peak in peaks)
        report.done()
        add_ratios(rows, "mode")
        report.rows += rows
        if rows:
            title = "{layer} {shape}, {dataset}, {nodes:,} nodes, {edges:,} edges"
            print_rows(title.format(**rows[0]), rows, COLUMNS)
    report.close()
    for row in report.rows:
        if row["competitor"] == PYG and row["mode"] != "forward":
            where = "{layer} {shape}, {dataset}, {mode}".format(**row)
            for key, text, bar in (
                ("time", "time", TIME_BAR), ("peak", "peak memory", MEMORY_BAR)
            ):  # fmt: skip
                unit = f"× (bar {bar:g})"
                report.figure(f"{where}, {text}: PyG over ours", row[f"{key}_over_ours"], unit)


def peak_memory(
    layer: str, shape: Shape, dataset: str, competitor: str, mode: Mode
) -> dict[str, float]:
    """Bytes above inputs and graph at the peak of one call; in a fresh process."""
    for graph in (graphs.load("random", nodes=fresh.TINY_NODES), _graph(dataset)):
        problem, functions = setup(layer, shape, graph)
        call = runner(functions[competitor], problem, mode)
        if graph.num_nodes == fresh.TINY_NODES:
            call()
    return fresh.peak(call)


def _time(
    layer: str, dataset: str, shape: Shape, options: argparse.Namespace, report: Report
) -> list[Row]:
    """Both modes of both layers, if they agree."""
    report.say(f"{dataset}: graph")
    graph = _graph(dataset)
    problem, functions = setup(layer, shape, graph)
    out, grads = runner(functions[PYG], problem, "forward+backward")()
    want = {"out": out} | {f"d{name}": g for name, g in zip(problem.inputs, grads, strict=True)}
    makes: dict[str, Callable[[], Function]] = {
        name: partial(functions.__getitem__, name) for name in functions
    }
    allowed = dict.fromkeys(want, TOLERANCE)
    allowed["dlin_key.bias"] = float("inf")  # it vanishes, but for rounding
    agreeing = right(makes, problem, want, f"{dataset} {shape}", report, allowed)
    rounds = options.rounds or (3 if options.quick else 9)
    timings = interleave(runners(agreeing, problem), rounds=rounds, tick=report.say)
    report.done()
    return timed_rows(timings, op="layer", layer=layer, dataset=dataset, shape=str(shape),
                      nodes=graph.num_nodes, edges=graph.num_edges)  # fmt: skip


def _graph(dataset: str) -> Graph:
    return load_graph(BY_DATASET[dataset])
