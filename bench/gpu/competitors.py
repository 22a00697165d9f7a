"""Ours and its peers on a GPU: which agree, their times, bandwidth and memory."""

import time
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

import grand_fast as gf
from bench.core import check
from bench.core.check import named
from bench.core.harness import Budget, interleave
from bench.core.problem import (
    MODES,
    OURS,
    Competitor,
    Function,
    Problem,
    Shape,
    UnavailableError,
    gradients,
    runner,
    runners,
)
from bench.core.report import Report
from bench.core.tables import (
    BOTH_TIMES,
    Column,
    both_modes,
    cell,
    ours_beside,
    print_rows,
    timed_rows,
)
from bench.gpu.device import Cuda, clock
from bench.peers.dgl import PEERS as DGL_PEERS
from bench.peers.unfused import eager_reference
from grand_fast.testing import TOLERANCE

# What a peer is called where it runs by another library than on a CPU.
_ON_GPU = {"torch.sparse (MKL)": "cuSPARSE SpMM (torch.sparse)"}
_CPU_ONLY = ("torch.sparse.mm(reduce)",)
COLUMNS: list[Column] = [
    *BOTH_TIMES,
    ("GB/s", cell("gb_per_s_max", "{:.0f}")),
    ("% of copy", cell("copy_percent", "{:.0f}")),
    ("peak MB", lambda row: cell("peak_bytes", "{:.0f}", 1e-6)(row["both"])),
    ("first call s", cell("first_call_s", "{:.2f}")),
]


def compare(
    module: ModuleType, graph: gf.Graph, shape: Shape, dtype: torch.dtype, device: Cuda,
    rates: dict[str, float], report: Report, budget: Budget, *, rounds: int,
    competitors: Sequence[Competitor],
) -> None:  # fmt: skip
    """Check, time and weigh the competitors on one operator and shape."""
    cpu = module.setup(graph, shape, element_bytes=dtype.itemsize)
    type_name = str(dtype).removeprefix("torch.")
    case = f"{cpu.op} {shape} {type_name}"
    if not budget.allows(case, 10.0):
        return
    report.say(f"{case}: reference")
    problem = _moved(cpu, device.device, dtype)
    want = _expected(problem)
    tolerances = _tolerances(problem, want)
    functions: dict[str, Function] = {}
    first: dict[str, float] = {}
    peaks: dict[tuple[str, str], int] = {}
    for competitor in competitors:
        name = _ON_GPU.get(competitor.name, competitor.name)
        report.say(f"{case}: {name}")
        if competitor.name != OURS and not budget.allows(f"{case}: {name}", 5.0):
            continue
        try:
            needed = competitor.bytes_needed(problem)
            if needed > (free := device.free_bytes()):
                raise UnavailableError(
                    f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                )
            start = time.perf_counter()
            function = competitor.make(problem)
            if competitor.name == OURS:  # whatever the device of its tensors is
                function = gf.backend(device.backend)(function)
            # its copy to the CPU waits for the device
            got = named(problem, *gradients(function, problem))
            first_s = time.perf_counter() - start
            if competitor.exact:
                check.compare(name, got, want, tolerances)
            del got
            for mode in MODES:
                peaks[name, mode] = device.peak_bytes(runner(function, problem, mode))
            functions[name], first[name] = function, first_s
        except AssertionError as difference:
            report.failed.append(f"{case}: {difference}")
        except torch.OutOfMemoryError:
            report.skipped.append(f"{case}: {name}: out of memory.")
        except Exception as problem_of_peer:  # a peer may fail in any way, and costs only itself
            if competitor.name == OURS:
                raise
            text = str(problem_of_peer).strip().splitlines() or [type(problem_of_peer).__name__]
            report.skipped.append(f"{case}: {name}: {text[0]}")
    del want
    calls = runners(functions, problem)
    each_s = max(2.0, min(20.0, budget.left / 4)) / max(1, len(calls))
    timings = interleave(calls, rounds=rounds, budget_s=each_s, **clock(device))
    rows = timed_rows(timings, op=problem.op, shape=str(shape), dtype=type_name,
                      graph=report.header["graph"])  # fmt: skip
    for row in rows:
        name, mode, seconds = row["competitor"], row["mode"], row["median_s"]
        row |= {"first_call_s": first[name], "peak_bytes": peaks[name, mode]}
        ours = ours_beside(row, rows, "mode")
        row["over_ours"] = seconds / ours["median_s"] if ours else None
        if mode == "forward":
            for bound in ("min", "max"):
                moved = getattr(problem.cost, f"bytes_{bound}")
                row[f"gb_per_s_{bound}"] = moved / seconds / 1e9
            row["copy_percent"] = 100 * row["gb_per_s_max"] / rates["copy_gb_per_s"]
    report.rows += rows
    report.done()
    if rows:
        print_rows(case, both_modes(rows), COLUMNS)


def peers(module: ModuleType) -> tuple[Competitor, ...]:
    """The competitors of the suite `ops` that run on a GPU, the eager reference, and DGL."""
    eager = Competitor(
        "eager reference",
        eager_reference,
        edge_floats=lambda shape: 4 * max(shape.channels, shape.attention_channels),
    )
    known = tuple(c for c in module.COMPETITORS if c.name not in _CPU_ONLY)
    op = module.__name__.rpartition("bench_")[2]
    return (*known[:1], eager, *known[1:], *DGL_PEERS.get(op, ()))


def _moved(problem: Problem, device: torch.device | str, dtype: torch.dtype) -> Problem:
    """The same on a device, with tensors of a type."""
    return replace(
        problem,
        graph=problem.graph.to(device),
        inputs={name: value.to(device, dtype) for name, value in problem.inputs.items()},
        d_out=problem.d_out.to(device, dtype),
    )


def _expected(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients in float64, on the device if it has the memory, of the same inputs."""
    wide = problem.double()
    try:
        return {k: v.cpu() for k, v in named(wide, *gradients(eager_reference(wide), wide)).items()}
    except torch.OutOfMemoryError:
        return check.expected(_moved(wide, "cpu", torch.float64))


def _tolerances(problem: Problem, want: dict[str, Tensor]) -> dict[str, float]:
    """Of float32, the table; of a half type, twice PyTorch's own error in it, and a rounding."""
    dtype = problem.d_out.dtype
    table = dict.fromkeys(want, TOLERANCE[dtype])
    if dtype == torch.float32:
        return table
    try:
        plain = named(problem, *gradients(eager_reference(problem), problem))
    except torch.OutOfMemoryError:
        return table
    rounding = torch.finfo(dtype).eps / 2
    for name, value in want.items():
        error = (plain[name].double().cpu() - value).abs().max() / value.abs().max()
        table[name] = max(table[name], 2 * float(error) + rounding)
    return table
