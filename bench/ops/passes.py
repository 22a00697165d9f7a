"""Our own passes over the edges, one by one: against the gather floor, MKL and the threads."""

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

import grand_fast as gf
from bench import fresh, machine
from bench.harness import Timing, interleave
from bench.ops import bench_attention_diffusion, bench_csr_diffusion
from bench.peers.arrays import GraphArrays
from bench.peers.sparse import mkl
from bench.problem import Function, Shape
from bench.progress import Progress
from bench.report import Report, milliseconds, print_table

Call = Callable[[], object]


def run(
    graph: gf.Graph, shape: Shape, rounds: int, report: Report, progress: Progress, *, quick: bool
) -> None:
    """Time the passes on one shape, and in fresh processes the first call."""
    threads = torch.get_num_threads()
    attention = attention_passes(graph, shape)
    # The floors first, torch's copy and MKL apart from them: OpenMP's threads spin for a while.
    calls = {
        "gather x rows": machine.gather_call(graph, shape.channels),
        "gather k rows": machine.gather_call(graph, shape.attention_channels),
    }
    calls |= attention | csr_passes(graph, shape.channels) | {"copy": machine.copy_call()}
    hub, bare = _hub_alone(graph)
    for name, call in attention.items():
        calls[f"{name}, 1 thread"] = on_threads(1, call)
    for name, call in attention_passes(hub, shape).items():
        calls[f"{name}, hub alone, 1 thread"] = on_threads(1, call)
    for name, call in attention_passes(bare, shape).items():
        calls[f"{name}, no edges, 1 thread"] = on_threads(1, call)
    timings = interleave(calls, rounds=rounds, tick=progress.say)
    rows = [
        {"op": "passes", "shape": str(shape), "competitor": name, "mode": "pass", **t.record()}
        for name, t in timings.items()
    ]
    report.rows += rows
    progress.done()
    cells = [[row["competitor"], milliseconds(row)] for row in rows]
    print_table(f"passes of grand-fast, d/H/d_att = {shape}, {graph}", ["", "ms"], cells)
    _figures(timings, threads, report)
    if not quick:
        first_calls(shape, report, progress)


def attention_passes(graph: gf.Graph, shape: Shape) -> dict[str, Call]:
    """`attention_diffusion` without its projections, forward and backward apart."""
    problem = bench_attention_diffusion.setup(graph, shape)
    x, q, k = bench_attention_diffusion.packed_projection(problem, *problem.inputs.values())
    x, q, k = (t.detach().requires_grad_() for t in (x, q, k))

    def function(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return gf.ops.attention_diffusion(x, q, k, graph)

    return {
        "edge pass forward": _forward(function, x, q, k),
        "edge passes backward": _backward(function, problem.d_out, x, q, k),
    }


def csr_passes(graph: gf.Graph, channels: int) -> dict[str, Call]:
    """`csr_diffusion`: its product, the product with `Aᵀ`, the gradient by the weights; and MKL."""
    problem = bench_csr_diffusion.setup(graph, Shape(channels, 1, 1))
    x, a = problem.inputs.values()
    x_leaf, a_leaf = (t.detach().requires_grad_() for t in (x, a))
    function = bench_csr_diffusion.ours(problem)
    matrix, product = GraphArrays(graph).matrix(a), mkl(channels)
    return {
        "csr product": _forward(function, x, a),
        "csr product with Aᵀ": _backward(function, problem.d_out, x_leaf, a),
        "csr weight gradient": _backward(function, problem.d_out, x, a_leaf),
        "csr product by MKL": lambda: product(matrix, x),
    }


def _forward(function: Function, *inputs: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def _backward(function: Function, d_out: Tensor, *inputs: Tensor) -> Call:
    """Backward alone, by those inputs that require a gradient.

    Which gradients an autograd Function computes is settled in its forward, so each choice of
    inputs has a forward of its own.
    """
    out = function(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def on_threads(threads: int, call: Call) -> Call:
    """`call` with that many threads."""

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            call()
        finally:
            torch.set_num_threads(before)

    return run


def _hub_alone(graph: gf.Graph) -> tuple[gf.Graph, gf.Graph]:
    """The same nodes with the edges of the longest row only, and with none."""
    edge_index = graph.edge_index()
    hub = int(graph.rowptr.diff().argmax())
    alone = edge_index[:, edge_index[1] == hub]
    n = graph.num_nodes
    return gf.Graph.from_edge_index(alone, n), gf.Graph.from_edge_index(alone[:, :0], n)


def _figures(timings: dict[str, Timing], threads: int, report: Report) -> None:
    seconds = {name: timing.median for name, timing in timings.items()}
    x_row, both = seconds["gather x rows"], seconds["gather x rows"] + seconds["gather k rows"]
    forward, backward = "edge pass forward", "edge passes backward"
    report.figure("edge pass forward over 2 row gathers (k, x)", seconds[forward] / both, "×")
    report.figure(
        "edge passes backward over 4 row gathers (k, x; q, df)", seconds[backward] / (2 * both), "×"
    )
    for name in ("csr product", "csr product with Aᵀ", "csr weight gradient"):
        report.figure(f"{name} over 1 row gather", seconds[name] / x_row, "×")
    speed_up = seconds["csr product by MKL"] / seconds["csr product"]
    report.figure("csr product: MKL over ours", speed_up, "×")
    for name in (forward, backward):
        if threads > 1:
            scaling = seconds[f"{name}, 1 thread"] / seconds[name]
            report.figure(f"{name}: 1 → {threads} threads", scaling, "×")
        alone = seconds[f"{name}, hub alone, 1 thread"] - seconds[f"{name}, no edges, 1 thread"]
        report.figure(f"{name}: the hub's row alone on 1 thread", 100 * alone / seconds[name], "%")


def first_calls(shape: Shape, report: Report, progress: Progress) -> None:
    """The first forward+backward of a process, with an empty and with a filled kernel cache."""
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            progress.say(f"first call, {state} cache")
            result = fresh.run("first_call", {"shape": shape}, cache=folder)
            report.figure(f"first call, {state} cache", result["seconds"], "s")
    progress.done()
