"""Ours and its peers on a GPU: which agree, their times, bandwidth and memory."""

import time
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

import grand_fast as gf
from bench.core.check import expected, named
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
)
from bench.core.report import Report, Row, milliseconds, print_table
from bench.gpu.device import Call, Device, clock, to_device
from bench.ops import (
    bench_attention_diffusion,
    bench_csr_diffusion,
    bench_edge_attention,
    bench_edge_softmax,
    bench_spmm,
    bench_stage_update,
)
from bench.peers.dgl import PEERS as DGL_PEERS
from grand_fast.testing import TOLERANCE, assert_close

MODULES: tuple[ModuleType, ...] = (
    bench_attention_diffusion,
    bench_csr_diffusion,
    bench_edge_attention,
    bench_edge_softmax,
    bench_spmm,
    bench_stage_update,
)
# What a peer is called where it runs by another library than on a CPU.
_ON_GPU = {"torch.sparse (MKL)": "cuSPARSE SpMM (torch.sparse)"}
_CPU_ONLY = ("torch.sparse.mm(reduce)",)


def compare(
    module: ModuleType,
    graph: gf.Graph,
    shape: Shape,
    dtype: torch.dtype,
    device: Device,
    rates: dict[str, float],
    report: Report,
    budget: Budget,
    *,
    rounds: int,
    competitors: Sequence[Competitor],
) -> None:
    """Check, time and weigh the competitors on one operator and shape."""
    cpu = module.setup(graph, shape, element_bytes=dtype.itemsize)
    case = f"{cpu.op} {shape} {str(dtype).removeprefix('torch.')}"
    if not budget.allows(case, 10.0):
        return
    report.say(f"{case}: reference")
    problem = replace(
        cpu,
        graph=graph.to(device.device),
        inputs=dict(zip(cpu.inputs, to_device(cpu.inputs.values(), device, dtype), strict=True)),
        d_out=cpu.d_out.to(device.device, dtype),
    )
    want = _expected(problem)
    tolerances = _tolerances(problem, want)
    functions: dict[str, Function] = {}
    rows: dict[str, Row] = {}
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
            with gf.backend(device.backend if competitor.name == OURS else "auto"):
                function = _bound(competitor, problem, device)
                # its copy to the CPU waits for the device
                got = named(problem, *gradients(function, problem))
                first = time.perf_counter() - start
            if competitor.exact:
                for key, value in want.items():
                    assert_close(f"{name}: {key}", got[key], value, tolerance=tolerances[key])
            del got
            row: Row = {"first_call_s": first, "peak_bytes": {}}
            for mode in MODES:
                row["peak_bytes"][mode] = device.peak_bytes(runner(function, problem, mode))
            functions[name], rows[name] = function, row
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
    calls: dict[str, Call] = {
        f"{name}|{mode}": runner(function, problem, mode)
        for name, function in functions.items()
        for mode in MODES
    }
    share = max(2.0, min(20.0, budget.left / 4))
    each = share / max(1, len(calls))
    timings = interleave(calls, rounds=rounds, budget_s=each, **clock(device))
    found = []
    for key, timing in timings.items():
        name, mode = key.split("|")
        row = {
            "op": problem.op,
            "shape": str(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "competitor": name,
            "mode": mode,
            "graph": report.header["graph"],
            **timing.record(),
            "first_call_s": rows[name]["first_call_s"],
            "peak_bytes": rows[name]["peak_bytes"][mode],
        }
        ours = timings.get(f"{OURS}|{mode}")
        row["over_ours"] = timing.median / ours.median if ours else None
        if mode == "forward":
            for bound in ("min", "max"):
                moved = getattr(problem.cost, f"bytes_{bound}")
                row[f"gb_per_s_{bound}"] = moved / timing.median / 1e9
            row["copy_percent"] = 100 * row["gb_per_s_max"] / rates["copy_gb_per_s"]
        found.append(row)
    report.rows += found
    report.done()
    _print(case, found)


def peers(module: ModuleType) -> tuple[Competitor, ...]:
    """The competitors of the suite `ops` that run on a GPU, the eager reference, and DGL."""
    eager = Competitor(
        "eager reference",
        _eager,
        edge_floats=lambda shape: 4 * max(shape.channels, shape.attention_channels),
    )
    known = tuple(c for c in module.COMPETITORS if c.name not in _CPU_ONLY)
    op = module.__name__.rpartition("bench_")[2]
    return (*known[:1], eager, *known[1:], *DGL_PEERS.get(op, ()))


def _eager(problem: Problem) -> Function:
    csr = problem.graph.csr()
    return lambda *inputs: problem.reference(csr, problem.core(*inputs))


def _bound(competitor: Competitor, problem: Problem, device: Device) -> Function:
    """Ours by the backend under measurement, whatever the device of its tensors is."""
    function = competitor.make(problem)
    if competitor.name != OURS:
        return function

    def call(*inputs: Tensor) -> Tensor:
        with gf.backend(device.backend):
            return function(*inputs)

    return call


def _expected(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients in float64, on the device if it has the memory, of the same inputs."""
    wide = problem.double()
    try:
        return {k: v.cpu() for k, v in named(wide, *gradients(_eager(wide), wide)).items()}
    except torch.OutOfMemoryError:
        return expected(
            replace(
                wide,
                graph=problem.graph.to("cpu"),
                inputs={name: value.cpu() for name, value in wide.inputs.items()},
                d_out=wide.d_out.cpu(),
            )
        )


def _tolerances(problem: Problem, want: dict[str, Tensor]) -> dict[str, float]:
    """Of float32, the table; of a half type, twice PyTorch's own error in it, and a rounding."""
    dtype = problem.d_out.dtype
    table = dict.fromkeys(want, TOLERANCE[dtype])
    if dtype == torch.float32:
        return table
    try:
        plain = named(problem, *gradients(_eager(problem), problem))
    except torch.OutOfMemoryError:
        return table
    rounding = torch.finfo(dtype).eps / 2
    for name, value in want.items():
        error = (plain[name].double().cpu() - value).abs().max() / value.abs().max()
        table[name] = max(table[name], 2 * float(error) + rounding)
    return table


def _print(case: str, rows: list[Row]) -> None:
    head = ["", "forward ms", "over ours", "forward+backward ms", "over ours", "GB/s",
            "% of copy", "peak MB", "first call s"]  # fmt: skip
    cells = []
    forward, both = ([row for row in rows if row["mode"] == mode] for mode in MODES)
    for f, b in zip(forward, both, strict=True):
        ratios = [f"{r['over_ours']:.2f}×" if r["over_ours"] else "" for r in (f, b)]
        cells.append(
            [f["competitor"], milliseconds(f), ratios[0], milliseconds(b), ratios[1],
             f"{f['gb_per_s_max']:.0f}", f"{f['copy_percent']:.0f}",
             f"{b['peak_bytes'] / 1e6:.0f}", f"{f['first_call_s']:.2f}"]
        )  # fmt: skip
    if cells:
        print_table(case, head, cells)
