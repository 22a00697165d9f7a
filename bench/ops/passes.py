"""Our own passes over the edges, one by one: against the gather floor, MKL and the threads."""

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

import grand_fast as gf
from bench.core import fresh, graphs, machine
from bench.core.harness import interleave, threads, timed
from bench.core.problem import Function, Shape, runner
from bench.core.report import Report
from bench.core.tables import cell, milliseconds, print_rows
from bench.ops import bench_attention_diffusion, bench_csr_diffusion
from bench.peers.sparse import GraphArrays, mkl
from grand_fast.kernels.cpu.rows import longest_whole_row, plan

Call = Callable[[], object]

FORWARD, BACKWARD, PRODUCT = "edge pass forward", "edge passes backward", "csr product"
VISITED, CACHED = ", as visited", ", senders in cache"
HUB, BARE = ", hub alone", ", no edges"
# Their rows of x and k, up to 1 KB each, fit into the cache of one core.
CACHED_SENDERS = 64
SHORT_CALLS = 5  # in each round, of calls that take a millisecond
# What is timed on one thread too: the figure's name, and the calls that it is the sum of. The
# last three show what the machine itself and the kernels give when memory is not shared.
SCALED = {
    FORWARD: (FORWARD,),
    BACKWARD: (BACKWARD,),
    PRODUCT: (PRODUCT,),
    "row gather floor": ("gather x rows", "gather k rows"),
    f"{FORWARD}{CACHED}": (f"{FORWARD}{CACHED}",),
    f"{PRODUCT}{CACHED}": (f"{PRODUCT}{CACHED}",),
    "multiply-adds in registers": ("multiply-adds",),
}


def run(graph: gf.Graph, shape: Shape, rounds: int, report: Report, *, quick: bool) -> None:
    """Time the passes on one shape, and in fresh processes the first call."""
    calls: dict[str, Call] = {}
    for text in ("", VISITED):
        for name, width in (("x", shape.channels), ("k", shape.attention_channels)):
            gather = machine.gather_call(graph, width, in_order=text == VISITED)
            calls[f"gather {name} rows{text}"] = gather
    calls["multiply-adds"] = machine.multiply_add_call()
    calls |= attention_passes(graph, shape) | csr_passes(graph, shape.channels)
    calls |= cached_passes(graph, shape) | {"copy": machine.copy_call()}
    hub = hub_passes(graph, shape)
    scaled = {name: calls[name] for parts in SCALED.values() for name in parts}
    for name, call in (scaled | hub).items():
        calls[f"{name}, 1 thread"] = threads(1)(call)
    repeats = {f"{name}, 1 thread": SHORT_CALLS for name in hub}
    timings = interleave(calls, rounds=rounds, repeats=repeats, tick=report.say)
    common = {"op": "passes", "shape": str(shape), "mode": "pass"}
    rows = [common | {"competitor": name} | t.record() for name, t in timings.items()]
    report.rows += rows
    report.done()
    title = f"passes of grand-fast, d/H/d_att = {shape}, {graph}"
    print_rows(title, rows, [("", cell("competitor")), ("ms", milliseconds)])
    _figures({name: timing.median for name, timing in timings.items()}, report)
    if not quick:
        first_calls(shape, report)


def attention_passes(graph: gf.Graph, shape: Shape) -> dict[str, Call]:
    """`attention_diffusion` without its projections, forward and backward apart."""
    problem = bench_attention_diffusion.setup(graph, shape)
    x, q, k = bench_attention_diffusion.packed_projection(problem, *problem.inputs.values())
    x, q, k = (t.detach().requires_grad_() for t in (x, q, k))

    def function(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return gf.ops.attention_diffusion(x, q, k, graph)

    return {
        FORWARD: _forward(function, x, q, k),
        BACKWARD: _backward(function, problem.d_out, x, q, k),
    }


def csr_passes(graph: gf.Graph, channels: int) -> dict[str, Call]:
    """`csr_diffusion`: its product, the product with `Aᵀ`, the gradient by the weights; and MKL."""
    problem = bench_csr_diffusion.setup(graph, Shape(channels, 1, 1))
    x, a = problem.inputs.values()
    x_leaf, a_leaf = (t.detach().requires_grad_() for t in (x, a))
    function = bench_csr_diffusion.ours(problem)
    matrix, product = GraphArrays(graph).matrix(a), mkl(channels)
    return {
        PRODUCT: _forward(function, x, a),
        "csr product with Aᵀ": _backward(function, problem.d_out, x_leaf, a),
        "csr weight gradient": _backward(function, problem.d_out, x, a_leaf),
        "csr product by MKL": lambda: product(matrix, x),
    }


def _forward(function: Function, *inputs: Tensor) -> Call:
    return torch.no_grad()(lambda: function(*inputs))


def _backward(function: Function, d_out: Tensor, *inputs: Tensor) -> Call:
    """Backward alone, by those inputs that require a gradient.

    Which gradients an autograd Function computes is settled in its forward, so each choice of
    inputs has a forward of its own.
    """
    out = function(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def cached_passes(graph: gf.Graph, shape: Shape) -> dict[str, Call]:
    """The forward passes on the same rows, all of whose senders are among a few nodes.

    Their rows stay in cache: what is left is the pass's own work, which memory cannot hold up.
    Forward only, since in `Aᵀ` the few would be hubs.
    """
    sender, receiver = graph.edge_index()
    near = torch.stack([sender % CACHED_SENDERS, receiver])
    cached = gf.Graph.from_edge_index(near, graph.num_nodes)
    calls = attention_passes(cached, shape) | csr_passes(cached, shape.channels)
    return {f"{name}{CACHED}": calls[name] for name in (FORWARD, PRODUCT)}


def hub_passes(graph: gf.Graph, shape: Shape) -> dict[str, Call]:
    """The passes over the longest row's edges alone, and over none of them, on few nodes."""
    alone, bare = hub_graphs(graph)
    return {
        f"{name}{text}": call
        for text, small in ((HUB, alone), (BARE, bare))
        for name, call in attention_passes(small, shape).items()
    }


def hub_graphs(graph: gf.Graph) -> tuple[gf.Graph, gf.Graph]:
    """The longest row's node and its senders, renumbered: with that row's edges, and with none.

    No other node is kept: on all of them two long times would differ by little, and by chance. The
    row is cut if it is in the whole graph, and only then.
    """
    hub = int(graph.rowptr.diff().argmax())
    senders = graph.col[graph.rowptr[hub] : graph.rowptr[hub + 1]].long()
    ends = torch.cat([senders, torch.tensor([hub])])
    nodes, local = torch.unique(ends, return_inverse=True)
    edges = torch.stack([local[:-1], local[-1].expand(senders.numel())])
    n = nodes.numel()
    alone, bare = (gf.Graph.from_edge_index(e, n) for e in (edges, edges[:, :0]))
    limit = longest_whole_row(graph.num_edges)
    for transposed in (False, True):
        view = plan(alone.csr(transposed=transposed), lambda: None, longest_whole=limit)
        alone._views[plan, transposed] = view
    return alone, bare


def _figures(seconds: dict[str, float], report: Report) -> None:
    x_row = seconds["gather x rows"]
    both, visited = (
        seconds[f"gather x rows{text}"] + seconds[f"gather k rows{text}"] for text in ("", VISITED)
    )
    forward, backward = seconds[FORWARD], seconds[BACKWARD]
    ratios = {
        "edge pass forward over 2 row gathers (k, x)": forward / both,
        "edge pass forward over 2 row gathers, rows as visited": forward / visited,
        "edge passes backward over 4 row gathers (k, x; q, df)": backward / (2 * both),
    }
    for name in (PRODUCT, "csr product with Aᵀ", "csr weight gradient"):
        ratios[f"{name} over 1 row gather"] = seconds[name] / x_row
    ratios["csr product: MKL over ours"] = seconds["csr product by MKL"] / seconds[PRODUCT]
    count = torch.get_num_threads()
    for name, parts in SCALED.items() if count > 1 else ():
        one = sum(seconds[f"{part}, 1 thread"] for part in parts)
        ratios[f"{name}: 1 → {count} threads"] = one / sum(seconds[part] for part in parts)
    for name, value in ratios.items():
        report.figure(name, value, "×")
    for name in (FORWARD, BACKWARD):
        hub = seconds[f"{name}{HUB}, 1 thread"] - seconds[f"{name}{BARE}, 1 thread"]
        report.figure(f"{name}: the hub's row alone on 1 thread", 100 * hub / seconds[name], "%")


def first_calls(shape: Shape, report: Report) -> None:
    """The first forward+backward of a process, with an empty and with a filled kernel cache."""
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            report.say(f"first call, {state} cache")
            result = fresh.run(first_call, cache=folder, shape=shape)
            report.figure(f"first call, {state} cache", result["seconds"], "s")
    report.done()


def first_call(shape: Shape) -> dict[str, float]:
    """Seconds of the first forward+backward of `attention_diffusion`, on a tiny graph."""
    graph = graphs.load("random", nodes=fresh.TINY_NODES)
    problem = bench_attention_diffusion.setup(graph, shape)
    call = runner(bench_attention_diffusion.ours(problem), problem, "forward+backward")
    return {"seconds": timed(call)}
