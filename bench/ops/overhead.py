"""The suite `overhead`: what Python costs around the kernels, on a graph that costs nothing."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grand_fast as gf
from bench.core.report import Report, print_table
from grand_fast.kernels.cpu.dense import Projection
from grand_fast.solvers.term import CountedTerm

EPILOG = """\
One evaluation of f in a warm solve (euler, variant nl, 4 heads) of 40 nodes on one thread: how many
Python functions of ours it calls, in how many files, and how long it takes above the launchers,
which prepare a kernel and run it; while training, and in inference. Then each operator alone,
called as a user does. Times are medians of --rounds times 200 calls, in microseconds.
"""
NODES, EDGES, CHANNELS, HEADS = 40, 160, 16, 4
STEPS = 200
FOLDERS = [Path(gf.__file__).parent.resolve(), (Path(gf.__file__).parent / "kernels").resolve()]
# Each operator, and the operators whose launchers it runs
OPERATORS = {
    "attention_diffusion": ("attention_diffusion",),
    "projected_attention_diffusion": ("attention_diffusion",),
    "csr_diffusion": ("csr_diffusion",),
    "edge_attention": ("edge_attention",),
    "stage_update": ("stage_update",),
    "error_ratio": ("error_ratio",),
}


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print, and fill `report`."""
    torch.set_num_threads(options.threads or 1)
    rounds = 1 if options.quick else options.rounds or 9
    for mode in ("inference", "training"):
        with torch.set_grad_enabled(mode == "training"):
            files, calls = _traced(_solve)
            seconds, inside = _timed(_solve, CountedTerm, "axpy", ("attention_diffusion",), rounds)
        row = {"op": "evaluation of f", "mode": mode, "files": files, "calls": calls}
        report.rows.append(row | {"seconds": seconds, "launchers_s": inside})
    for name, kernels in OPERATORS.items():
        call = _operator_call(name)
        with torch.no_grad():
            seconds, inside = _timed(call, sys.modules[__name__], "_call", kernels, rounds)
        report.rows.append(
            {"op": name, "mode": "inference", "seconds": seconds, "launchers_s": inside}
        )
    head = ["µs on one thread", "mode", "files", "calls", "all", "launchers", "above them"]
    cells = []
    for row in report.rows:
        times = (row["seconds"], row["launchers_s"], row["seconds"] - row["launchers_s"])
        counts = [str(row.get("files", "")), str(row.get("calls", ""))]
        cells.append([row["op"], row["mode"], *counts, *(f"{t * 1e6:.0f}" for t in times)])
    print_table(f"{NODES} nodes, {EDGES} edges, {CHANNELS} channels", head, cells)


def _graph() -> gf.Graph:
    torch.manual_seed(0)
    return gf.Graph.from_edge_index(torch.randint(NODES, (2, EDGES)), NODES)


def _solve() -> None:
    """A solve of `STEPS` evaluations."""
    graph, x = _graph(), torch.randn(NODES, CHANNELS)
    layer = gf.nn.GRANDConv(
        CHANNELS, heads=HEADS, T=float(STEPS), method="euler", adjoint="direct", alpha=0.01
    )
    layer(x, graph)


def _call(operator: Callable[[], Tensor]) -> None:
    operator()


def _operator_call(name: str) -> Callable[[], None]:
    """`STEPS` calls of an operator."""
    graph, x = _graph(), torch.randn(NODES, CHANNELS)
    q, k = torch.randn(2, NODES, HEADS, CHANNELS // HEADS)
    weight, bias = torch.randn(2 * CHANNELS, CHANNELS), torch.randn(2 * CHANNELS)
    a, operator = torch.rand(EDGES), getattr(gf.ops, name)
    arguments: dict[str, tuple[Any, ...]] = {
        "attention_diffusion": (x, q, k, graph),
        "projected_attention_diffusion": (x, weight, bias, graph),
        "csr_diffusion": (x, a, graph),
        "edge_attention": (q, k, graph),
        "stage_update": ([(1.0, x), (0.5, x.clone())],),
        "error_ratio": ([(1.0, x)], x, x.clone()),
    }
    options: dict[str, dict[str, Any]] = {
        "projected_attention_diffusion": {"heads": HEADS},
        "error_ratio": {"rtol": 1e-3, "atol": 1e-3},
    }

    def call() -> None:
        for _ in range(STEPS):
            _call(lambda: operator(*arguments[name], **options.get(name, {})))

    return call


def _traced(call: Callable[[], None]) -> tuple[int, int]:
    """Files and Python functions of ours in the last evaluation of `call`."""
    files: set[str] = set()
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        path = Path(frame.f_code.co_filename).resolve()
        if event == "call" and any(path.is_relative_to(folder) for folder in FOLDERS):
            calls += 1
            files.add(str(path))

    axpy = CountedTerm.axpy

    def traced(*given: Any) -> Tensor:
        nonlocal calls
        calls = 0
        files.clear()
        sys.setprofile(count)
        try:
            return axpy(*given)
        finally:
            sys.setprofile(None)

    with _replaced(CountedTerm, "axpy", traced):
        call()
    return len(files), calls


def _timed(
    call: Callable[[], None], owner: Any, name: str, kernels: tuple[str, ...], rounds: int
) -> tuple[float, float]:
    """Seconds of one call of `owner.name` within `call`, and of the launchers within it."""
    outer: list[float] = []
    inner: list[float] = []
    running = 0.0

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            start = time.perf_counter()
            result = function(*args, **kwargs)
            running += time.perf_counter() - start
            return result

        return run

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal running
            running, start = 0.0, time.perf_counter()
            result = function(*args, **kwargs)
            outer.append(time.perf_counter() - start)
            inner.append(running)
            return result

        return run

    places: list[tuple[Any, str]] = [(Projection, "__call__")]
    for kernel in kernels:
        places.append((import_module(f"grand_fast.kernels.{kernel}.cpu"), f"{kernel}_fwd"))
    call()  # compiles what is to be compiled
    with _replaced(owner, name, whole(getattr(owner, name))):
        stack = [_replaced(o, n, measured(getattr(o, n))) for o, n in places if hasattr(o, n)]
        for replaced in stack:
            replaced.__enter__()
        try:
            for _ in range(rounds):
                call()
        finally:
            for replaced in stack:
                replaced.__exit__(None, None, None)
    return float(np.median(outer)), float(np.median(inner))


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)
