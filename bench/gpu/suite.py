"""The suite `gpu`: correctness, times, memory and launch parameters of the GPU kernels."""

import argparse
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

import torch

from bench.core import graphs
from bench.core.harness import Budget
from bench.core.plots import plot_per_shape
from bench.core.problem import PAPER_SHAPES, Shape
from bench.core.report import Report
from bench.gpu import competitors, correctness
from bench.gpu.device import Cuda, rates
from bench.gpu.search import Pass, measure_kernels
from bench.gpu_report import launches
from bench.gpu_report.compile import MODELLED
from bench.gpu_report.locality import Reuse, gathered_rows
from bench.gpu_report.metrics import label, machine_code
from bench.gpu_report.model import is_modelled, times
from bench.ops.suite import MODULES
from grand_fast import Graph
from grand_fast.ops.backends import unsupported_reasons

EPILOG = """\
For a machine with a GPU; one command, under eight minutes, measures every claim about the kernels:

1. output and every gradient of every operator against float64, on graphs with hubs, empty rows and
   odd sizes, in float32, bfloat16 and float16, and of every score, normaliser and direction; two
   runs must agree bit for bit;
2. times by events, caches flushed, in interleaved rounds: the eager reference, torch.compile,
   cuSPARSE, PyG, and DGL where it is installed; bandwidth, against that of a copy and of a gather
   in this run; peak memory. What disagrees with the reference gets no time, and the exit code is 1;
3. our kernels one by one, beside the model of gpu-report on A100 and H100, and with other launch
   parameters. It only reports them.

--minutes is the time it may take; what did not fit is said in the end. --quick takes one shape and
few rounds. Without a GPU, `python -m bench gpu-report` says what can be known without one.
"""
PICTURES = ("gpu_time_per_shape.png", "gpu_memory_per_shape.png")
PASSES = ("attention_diffusion forward", "attention_diffusion backward", "csr_diffusion forward")
_DTYPES = (torch.float32, torch.bfloat16)


def run(options: argparse.Namespace, report: Report) -> None:
    """On the current GPU; a ValueError says why there is none to measure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reasons := unsupported_reasons("gpu", device, torch.float32):
        raise ValueError(
            f"gpu: the GPU kernels cannot run: {'; '.join(reasons)}. "
            "Use `python -m bench gpu-report`, which needs no GPU."
        )
    measure(Cuda(), options, report)


def measure(device: Cuda, options: argparse.Namespace, report: Report, **small: Any) -> None:
    """All of it on a device. `small` shrinks the checks, for a device that is no GPU."""
    budget = Budget(60 * options.minutes)
    report.header |= device.header()
    shapes = (
        [options.shape] if options.shape else list(PAPER_SHAPES[: 1 if options.quick else None])
    )
    rounds = options.rounds or (7 if options.quick else 25)
    graph = graphs.load(options.graph, nodes=options.nodes)
    bandwidth = rates(device, shapes[0].channels, scale=small.pop("scale", 1.0))
    report.header |= bandwidth
    print(f"{report.header['device']}: " + ", ".join(f"{k} {v:.0f}" for k, v in bandwidth.items()))
    first, *others = _DTYPES
    # The main shape and the launch parameters first: they are what a short budget is for.
    main = [(module, shapes[0], first) for module in MODULES]
    rest = [(module, shapes[0], dtype) for dtype in others for module in MODULES]
    rest += [(MODULES[0], shape, d) for shape in shapes[1:] for d in _DTYPES]
    passes = kernel_passes(graph, shapes[0], device)
    report.start(1 + len(main) + len(passes) + len(rest))
    correctness.check_kernels(device, report, budget, **small)
    correctness.check_family(device, report, budget, **small)

    def compare(module: ModuleType, shape: Shape, dtype: torch.dtype) -> None:
        # As in `ops`: peers that take long, to compile or to run, on the first shape only
        chosen = [c for c in competitors.peers(module) if shape == shapes[0] or not c.slow]
        competitors.compare(
            module, graph, shape, dtype, device, bandwidth, report, budget,
            rounds=rounds, competitors=chosen,
        )  # fmt: skip

    for case in main:
        compare(*case)
    if report.failed:
        report.skipped.append("launch parameters: something disagrees with the reference.")
    else:
        model = _modelled(graph, shapes[0], device)
        measure_kernels(passes, device, report, budget, rounds=rounds, model=model)
    for case in rest:
        compare(*case)
    report.close()
    if budget.left_out:
        what = "; ".join(budget.left_out)
        report.skipped.append(f"for lack of time (--minutes {options.minutes:g}): {what}.")
    if options.out:
        rows = [row for row in report.rows if row.get("dtype") == "float32"]
        plot_per_shape(rows, "median_s", options.out / PICTURES[0])
        plot_per_shape(rows, "peak_bytes", options.out / PICTURES[1])


def kernel_passes(graph: Graph, shape: Shape, device: Cuda) -> dict[str, Pass]:
    """The launchers of `attention_diffusion` and `csr_diffusion` on the device, float32."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*size, generator=g).to(device.device, dtype)

    there = graph.to(device.device)
    given = launches.inputs(there, shape, torch.float32, make=normal)
    _, norm = launches.calls(given)[PASSES[0]]()

    def run(name: str, piece_edges: int) -> None:
        views = launches.views(there, piece_edges=piece_edges)
        launches.calls(given._replace(norm=norm, **views))[name]()

    return {name: partial(run, name) for name in PASSES}


def _modelled(graph: Graph, shape: Shape, device: Cuda) -> dict[str, float]:
    """Seconds of the GPU report's model, by kernel, where it knows the GPU."""
    if device.arch not in MODELLED or device.device.type != "cuda":
        return {}
    found = {}
    for launch in chain.from_iterable(launches.passes(graph, shape, torch.float32).values()):
        kernel = machine_code(launch, device.arch)
        if is_modelled(kernel):
            reuse = Reuse(gathered_rows(launch), graph.num_nodes)
            found[label(launch)] = times(kernel, reuse).seconds
    return found
