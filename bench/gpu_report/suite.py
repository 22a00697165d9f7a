"""The suite `gpu-report`: machine code of the GPU kernels, and a model of their time on a graph."""

import argparse
import os
from dataclasses import asdict
from itertools import product

import torch

from bench.core import graphs, machine
from bench.core.plots import plot_model
from bench.core.problem import PAPER_SHAPES, Shape
from bench.core.report import Progress, Report, Row, print_table
from bench.gpu_report import golden
from bench.gpu_report.bars import gathered_wide_percent, print_bars
from bench.gpu_report.compile import MODELLED, Launch
from bench.gpu_report.hardware import GPUS
from bench.gpu_report.launches import passes
from bench.gpu_report.locality import Reuse, community_order, gathered_rows
from bench.gpu_report.metrics import Kernel, Metrics, label, machine_code
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
_BOUNDS = ("dram", "l2", "pipe", "latency", "longest")


def run(options: argparse.Namespace, report: Report) -> None:
    """Compile, print as it comes, and fill `report`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("gpu-report: needs Triton's compiler: unset TRITON_INTERPRET.")
    report.header["device"] = "none: compiled for, and modelled on, A100 and H100"
    if options.update_golden:
        _update_golden()
        return
    nodes = options.nodes or graphs.ARXIV_NODES
    needed = round(nodes * graphs.edges_per_node() * graphs.BUILDING_BYTES)
    machine.require_memory("gpu-report", needed)
    graph = graphs.load(options.graph, nodes=options.nodes)
    shapes = [options.shape] if options.shape else PAPER_SHAPES[: 1 if options.quick else None]
    dtypes = [torch.float32] if options.quick else [torch.float32, torch.bfloat16]
    report.start(len(shapes) * len(dtypes) * len(MODELLED))
    report.say("order of the graph")
    reuses = _Reuses(graph)
    for shape, dtype in product(shapes, dtypes):
        by_pass = passes(graph, shape, dtype)
        for arch in MODELLED:
            report.say(f"{golden.case_name(arch, shape, dtype)}")
            kernels = _compiled(by_pass, arch)
            rows = [
                _row(name, kernels[label(launch)], launch, shape, dtype, reuses, report)
                for name, launches in by_pass.items()
                for launch in launches
            ]
            report.done()
            _print(rows, golden.case_name(arch, shape, dtype), graph)
            report.rows += rows
            exact = {name: kernel.metrics for name, kernel in kernels.items()}
            _compare(golden.case_name(arch, shape, dtype), exact)
    report.close()
    print_bars(report.rows, {str(shape): shape for shape in shapes}, report)
    report.skipped.append("joins of split rows are not modelled: they move some hundred rows.")
    if options.out:
        first = [row for row in report.rows if row["shape"] == str(shapes[0])]
        plot_model(first, options.out / PICTURE)


class _Reuses:
    """How rows are used again by each launch, in each order; launches of one view share it."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = graph.num_nodes
        self._position = {"natural": None, "rcm": community_order(graph)}
        self._known: dict[tuple[int, int, str], Reuse] = {}

    def of(self, launch: Launch, order: str) -> Reuse:
        """The distances at which a launch comes back to a row."""
        key = (launch.arguments["col_ptr"].data_ptr(), launch.grid[0], order)
        if key not in self._known:
            rows = gathered_rows(launch, self._position[order])
            self._known[key] = Reuse(rows, self._nodes)
        return self._known[key]


def _compiled(by_pass: dict[str, list[Launch]], arch: str) -> dict[str, Kernel]:
    """Each kernel once, by its label."""
    kernels: dict[str, Kernel] = {}
    for launches in by_pass.values():
        for launch in launches:
            if label(launch) not in kernels:
                kernels[label(launch)] = machine_code(launch, arch)
    return kernels


def _row(
    of_pass: str,
    kernel: Kernel,
    launch: Launch,
    shape: Shape,
    dtype: torch.dtype,
    reuses: _Reuses,
    report: Report,
) -> Row:
    row: Row = {
        "pass": of_pass,
        "kernel": label(launch),
        "gpu": GPUS[kernel.arch].name,
        "arch": kernel.arch,
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "graph": report.header["graph"],
        "programs": launch.grid[0],
        "exact": asdict(kernel.metrics),
        "float_atomics": kernel.used.float_atomics,
    }
    if not is_modelled(kernel):
        return row
    row["gathered_wide_percent"] = round(gathered_wide_percent(kernel), 1)
    row["model"] = {}
    for order in ORDERS:
        modelled = times(kernel, reuses.of(launch, order))
        row["model"][order] = {f"{name}_s": getattr(modelled, name) for name in _BOUNDS} | {
            "seconds": modelled.seconds,
            "added_s": modelled.added,
            "bound": modelled.bound,
            "busiest_pipe": modelled.busiest,
            "floor_s": modelled.floor,
        }
    return row


def _print(rows: list[Row], case: str, graph: Graph) -> None:
    gpu, sizes = rows[0]["gpu"], f"N = {graph.num_nodes:,}, E = {graph.num_edges:,}"
    head = ["kernel", "registers", "spills", "warps/SM", "128-bit %", "instructions", "FP",
            "shuffles", "exponentials", "barriers", "kB in flight"]  # fmt: skip
    cells = {}
    for row in rows:
        m = Metrics(**row["exact"])
        cells[row["kernel"]] = [
            *(str(value) for value in (m.registers, m.spills, m.warps)),
            f"{m.wide_percent:.0f}",
            *(f"{value:.1f}" for value in (m.instructions, m.fp, m.shuffles, m.mufu)),
            f"{m.barriers:.0f}",
            f"{m.bytes_in_flight / 1024:.1f}",
        ]
    title = f"EXACT, {gpu}: code of {case}; instructions to exponentials per edge slot"
    print_table(title, head, [[name, *values] for name, values in cells.items()])
    head = ["kernel", "DRAM", "L2", "pipe", "latency", "longest", "bound by", "× floor", "added",
            "rcm: × floor", "added"]  # fmt: skip
    lines = []
    for of_pass in dict.fromkeys(row["pass"] for row in rows):
        modelled = [row for row in rows if row["pass"] == of_pass and "model" in row]
        lines += [_line(row["kernel"], [row]) for row in modelled]
        if len(modelled) > 1:
            lines.append(_line(f"= {of_pass}", modelled))
    print_table(
        f"MODEL, {gpu}, milliseconds, nothing ran: {case}, {rows[0]['graph']}, {sizes}", head, lines
    )


def _line(name: str, rows: list[Row]) -> list[str]:
    """One kernel, or the sum of a pass."""
    natural = rows[0]["model"]["natural"]
    parts, bound = [""] * len(_BOUNDS), ""
    if len(rows) == 1:
        parts = [f"{1e3 * natural[f'{bound}_s']:.3f}" for bound in _BOUNDS]
        bound = natural["busiest_pipe"] if natural["bound"] == "pipe" else natural["bound"]
    return [name, *parts, bound, *_over_floor(rows)]


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


def _update_golden() -> None:
    """Measure every case, say what changed, and write."""
    progress = Progress(len(MODELLED) * len(golden.CASES))
    found = {}
    for case, exact in golden.every_case():
        progress.done()
        found[case] = exact
        _compare(case, exact)
    progress.close()
    golden.save(found)
    print(f"Written: {golden.PATH}")
