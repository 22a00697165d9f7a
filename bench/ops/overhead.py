"""The suite `overhead`: what Python costs around the kernels, on a graph that costs nothing."""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import grand_fast as gf
from bench.core.report import Report
from bench.core.tables import Column, cell, print_rows
from grand_fast.kernels.cpu.dense import Projection
from grand_fast.solvers.counted import CountedTerm

EPILOG = """\
One evaluation of f in a warm solve (euler, variant nl, 4 heads) of 40 nodes on one thread: how many
Python functions of ours it calls, in how many files, and how long it takes above the launchers,
which prepare a kernel and run it; while training, and in inference. Then each operator alone,
called as a user does. Times are medians of --rounds times 200 calls, in microseconds.
"""
NODES, EDGES, CHANNELS, HEADS = 40, 160, 16, 4
STEPS = 200
FOLDERS = [Path(gf.__file__).parent.resolve(), (Path(gf.__file__).parent / "kernels").resolve()]
COLUMNS: list[Column] = [
    ("µs on one thread", cell("op")),
    ("mode", cell("mode")),
    ("files", cell("files")),
    ("calls", cell("calls")),
    ("all", cell("seconds", "{:.0f}", 1e6)),
    ("launchers", cell("launchers_s", "{:.0f}", 1e6)),
    ("above them", lambda row: f"{(row['seconds'] - row['launchers_s']) * 1e6:.0f}"),
]


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print, and fill `report`."""
    torch.set_num_threads(options.threads or 1)
    rounds = 1 if options.quick else options.rounds or 9
    for mode in ("inference", "training"):
        with torch.set_grad_enabled(mode == "training"):
            files, functions = _traced(_solve)
            seconds, inside = _timed(_solve, CountedTerm, "axpy", "attention_diffusion", rounds)
        row = {"op": "evaluation of f", "mode": mode, "files": files, "calls": functions}
        report.rows.append(row | {"seconds": seconds, "launchers_s": inside})
    for name, operator in _operators().items():

        def calls(operator: Callable[[], object] = operator) -> None:
            for _ in range(STEPS):
                _call(operator)

        kernel = name.removeprefix("projected_")  # whose launchers it runs
        with torch.no_grad():
            seconds, inside = _timed(calls, sys.modules[__name__], "_call", kernel, rounds)
        row = {"op": name, "mode": "inference"}
        report.rows.append(row | {"seconds": seconds, "launchers_s": inside})
    print_rows(f"{NODES} nodes, {EDGES} edges, {CHANNELS} channels", report.rows, COLUMNS)


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


def _call(operator: Callable[[], object]) -> None:
    operator()


def _operators() -> dict[str, Callable[[], object]]:
    """A call of each, as a user makes it."""
    graph, x = _graph(), torch.randn(NODES, CHANNELS)
    q, k = torch.randn(2, NODES, HEADS, CHANNELS // HEADS)
    weight, bias = torch.randn(2 * CHANNELS, CHANNELS), torch.randn(2 * CHANNELS)
    a, y, ops = torch.rand(EDGES), x.clone(), gf.ops
    return {
        "attention_diffusion": lambda: ops.attention_diffusion(x, q, k, graph),
        "projected_attention_diffusion": lambda: ops.projected_attention_diffusion(
            x, weight, bias, graph, heads=HEADS
        ),
        "csr_diffusion": lambda: ops.csr_diffusion(x, a, graph),
        "edge_attention": lambda: ops.edge_attention(q, k, graph),
        "stage_update": lambda: ops.stage_update([(1.0, x), (0.5, y)]),
        "error_ratio": lambda: ops.error_ratio([(1.0, x)], x, y, rtol=1e-3, atol=1e-3),
    }


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

    with patch.object(CountedTerm, "axpy", traced):
        call()
    return len(files), calls


def _timed(
    call: Callable[[], None], owner: Any, name: str, kernel: str, rounds: int
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

    launchers = import_module(f"grand_fast.kernels.{kernel}.cpu")
    call()  # compiles what is to be compiled
    with ExitStack() as replaced:
        replaced.enter_context(patch.object(owner, name, whole(getattr(owner, name))))
        for place, own in ((Projection, "__call__"), (launchers, f"{kernel}_fwd")):
            replaced.enter_context(patch.object(place, own, measured(getattr(place, own))))
        for _ in range(rounds):
            call()
    return float(np.median(outer)), float(np.median(inner))
