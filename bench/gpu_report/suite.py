"""The suite `gpu-report`: machine code of the GPU kernels, and a model of their time on a graph."""

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain, product

import torch

from bench.core import graphs, machine
from bench.core.plots import plot_model
from bench.core.problem import PAPER_SHAPES
from bench.core.report import Report
from bench.core.tables import Column, Row, cell, print_rows, print_table
from bench.gpu_report import golden
from bench.gpu_report.bars import gathered_wide_percent, print_bars
from bench.gpu_report.compile import MODELLED, Launch
from bench.gpu_report.hardware import GPUS
from bench.gpu_report.launches import passes
from bench.gpu_report.locality import Reuse, community_order, gathered_rows
from bench.gpu_report.metrics import Kernel, Metrics, compiled, label
from bench.gpu_report.model import is_modelled, times
from grand_fast import Graph

EPILOG = """\
No GPU is needed, and nothing runs on one. Every kernel is compiled as its launcher would have it
for A100 (sm_80) and H100 (sm_90), and two tables say what came out.

Exact, read from the machine code: registers, spills, warps per multiprocessor, and per edge slot of
the gather loops the instructions, shuffles and exponentials; compared with golden.json, of which
--update-golden writes a new one, and does nothing else.

A MODEL, not a measurement: the milliseconds that DRAM, L2, the busiest pipe, latency and the
longest piece would take on the graph, each alone. Over the floor of memory stand the longest of
them, and, `added`, memory plus the longest of the others: for rows by number, and in reverse
Cuthill-McKee order. The assumptions stand in bench/gpu_report/model.py, the hardware's numbers in
hardware.py. A last table holds attention_diffusion, all shapes, against the bars of
bench/gpu_report/bars.py, and names those missed. --quick takes one shape, and leaves out bfloat16.
"""
ORDERS = ("natural", "rcm")
PICTURE = "gpu_report_model.png"
_EXACT: list[Column] = [
    ("kernel", cell("kernel")),
    ("registers", cell("registers")),
    ("spills", cell("spills")),
    ("warps/SM", cell("warps")),
    ("128-bit %", cell("wide_percent", "{:.0f}")),
    ("instructions", cell("instructions", "{:.1f}")),
    ("FP", cell("fp", "{:.1f}")),
    ("shuffles", cell("shuffles", "{:.1f}")),
    ("exponentials", cell("mufu", "{:.1f}")),
    ("barriers", cell("barriers", "{:.0f}")),
    ("kB in flight", cell("bytes_in_flight", "{:.1f}", 1 / 1024)),
]
_BOUNDS = ("dram", "l2", "pipe", "latency", "longest")


def run(options: argparse.Namespace, report: Report) -> None:
    """Compile, print as it comes, and fill `report`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("gpu-report: needs Triton's compiler: unset TRITON_INTERPRET.")
    report.header["device"] = "none: compiled for, and modelled on, A100 and H100"
    if options.update_golden:
        _update_golden(report)
        return
    nodes = options.nodes or graphs.ARXIV_NODES
    needed = round(nodes * graphs.edges_per_node() * graphs.BUILDING_BYTES)
    machine.require_memory("gpu-report", needed)
    graph = graphs.load(options.graph, nodes=options.nodes)
    shapes = [options.shape] if options.shape else PAPER_SHAPES[: 1 if options.quick else None]
    dtypes = [torch.float32] if options.quick else [torch.float32, torch.bfloat16]
    report.start(len(shapes) * len(dtypes) * len(MODELLED))
    report.say("order of the graph")
    reuses = _reuses(graph)
    for shape, dtype in product(shapes, dtypes):
        common = {"shape": str(shape), "dtype": str(dtype).removeprefix("torch."),
                  "graph": options.graph}  # fmt: skip
        by_pass = passes(graph, shape, dtype)
        for arch in MODELLED:
            case = golden.case_name(arch, shape, dtype)
            report.say(case)
            kernels = compiled(chain.from_iterable(by_pass.values()), arch)
            rows = [
                common | {"pass": name} | _row(kernels[label(launch)], launch, reuses)
                for name, launches in by_pass.items()
                for launch in launches
            ]
            report.done()
            _print(rows, case, graph)
            report.rows += rows
            _compare(case, {name: kernel.metrics for name, kernel in kernels.items()})
    report.close()
    print_bars(report.rows, {str(shape): shape for shape in shapes}, report)
    report.skipped.append("joins of split rows are not modelled: they move some hundred rows.")
    if options.out:
        first = [row for row in report.rows if row["shape"] == str(shapes[0])]
        plot_model(first, options.out / PICTURE)


Reuses = Callable[[Launch, str], Reuse]


def _reuses(graph: Graph) -> Reuses:
    """How rows are used again by a launch, in an order; launches of one view share it."""
    position = {"natural": None, "rcm": community_order(graph)}
    known: dict[tuple[int, int, str], Reuse] = {}

    def of(launch: Launch, order: str) -> Reuse:
        key = (launch.arguments["col_ptr"].data_ptr(), launch.grid[0], order)
        if key not in known:
            known[key] = Reuse(gathered_rows(launch, position[order]), graph.num_nodes)
        return known[key]

    return of


def _row(kernel: Kernel, launch: Launch, reuses: Reuses) -> Row:
    """What a launch is and needs; where it is modelled, its times."""
    row: Row = {
        "kernel": label(launch),
        "gpu": GPUS[kernel.arch].name,
        "arch": kernel.arch,
        "programs": launch.grid[0],
        "exact": asdict(kernel.metrics),
        "float_atomics": kernel.used.float_atomics,
    }
    if not is_modelled(kernel):
        return row
    row["gathered_wide_percent"] = round(gathered_wide_percent(kernel), 1)
    row["model"] = {}
    for order in ORDERS:
        modelled = times(kernel, reuses(launch, order))
        row["model"][order] = {f"{name}_s": getattr(modelled, name) for name in _BOUNDS} | {
            "seconds": modelled.seconds,
            "added_s": modelled.added,
            "bound": modelled.bound,
            "busiest_pipe": modelled.busiest,
            "floor_s": modelled.floor,
        }
    return row


def _print(rows: list[Row], case: str, graph: Graph) -> None:
    gpu = rows[0]["gpu"]
    kernels = {row["kernel"]: row["exact"] | {"kernel": row["kernel"]} for row in rows}
    title = f"EXACT, {gpu}: code of {case}; instructions to exponentials per edge slot"
    print_rows(title, kernels.values(), _EXACT)
    head = ["kernel", "DRAM", "L2", "pipe", "latency", "longest", "bound by", "× floor", "added",
            "rcm: × floor", "added"]  # fmt: skip
    lines = []
    for of_pass in dict.fromkeys(row["pass"] for row in rows):
        modelled = [row for row in rows if row["pass"] == of_pass and "model" in row]
        for row in modelled:
            natural = row["model"]["natural"]
            parts = [f"{1e3 * natural[f'{bound}_s']:.3f}" for bound in _BOUNDS]
            bound = natural["busiest_pipe" if natural["bound"] == "pipe" else "bound"]
            lines.append([row["kernel"], *parts, bound, *_over_floor([row])])
        if len(modelled) > 1:
            empty = [""] * (len(_BOUNDS) + 1)
            lines.append([f"= {of_pass}", *empty, *_over_floor(modelled)])
    sizes = f"N = {graph.num_nodes:,}, E = {graph.num_edges:,}"
    title = f"MODEL, {gpu}, milliseconds, nothing ran: {case}, {rows[0]['graph']}, {sizes}"
    print_table(title, head, lines)


def _over_floor(rows: list[Row]) -> list[str]:
    """For each order, the time of these kernels over their floor: side by side, and added."""
    cells = []
    for order in ORDERS:
        models = [row["model"][order] for row in rows]
        floor = sum(m["floor_s"] for m in models)
        cells += [f"{sum(m[key] for m in models) / floor:.2f}" for key in ("seconds", "added_s")]
    return cells


def _compare(case: str, exact: dict[str, Metrics]) -> None:
    """Against golden.json, if it was made with this compiler."""
    known = golden.load()
    if not golden.is_of_this_compiler(known):
        print(f"{case}: not compared, golden.json was made with triton {known['triton']}.")
        return
    difference = golden.compare(case, exact, known)
    for word, sentences in (("Worse", difference.worse), ("Better", difference.better)):
        for sentence in sentences:
            print(f"{word} than golden.json: {sentence}")


def _update_golden(report: Report) -> None:
    """Measure every case, say what changed, and write."""
    report.start(len(MODELLED) * len(golden.CASES))
    found = {}
    for case, exact in golden.every_case():
        report.done()
        found[case] = exact
        _compare(case, exact)
    report.close()
    golden.save(found)
    print(f"Written: {golden.PATH}")
