"""The suite `scaling`: time per edge as the graph grows out of the caches."""

import argparse

from bench.core import graphs, machine
from bench.core.check import check, expected
from bench.core.harness import interleave
from bench.core.plots import plot_time_per_edge
from bench.core.problem import Shape
from bench.core.report import Report
from bench.core.tables import Row, cell, print_table
from bench.ops import bench_attention_diffusion, bench_csr_diffusion
from bench.ops.passes import attention_passes, csr_passes
from grand_fast import Graph

EPILOG = """\
Graphs have arxiv's degrees, `random` without any locality and `local` numbered by community, from
10^5 edges to 6·10^7 (--quick: 10^6). The shape is 64/2/32 unless given. Sizes that do not fit
into memory are refused before anything is measured.
"""
DEFAULT_SHAPE = Shape(64, 2, 32)
EDGES = (100_000, 1_000_000, 10_000_000, 60_000_000)
QUICK_EDGES = (100_000, 1_000_000)
# The reference in float64 is run up to here; beyond, the same kernels meet only more rows.
CHECK_UP_TO = 1_000_000


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`."""
    require_memory(options)
    measure(options, report)


def require_memory(options: argparse.Namespace) -> None:
    """Raise `DoesNotFitError` if the largest size does not fit."""
    edges = max(_sizes(options))
    needed = bytes_needed(edges, options.shape or DEFAULT_SHAPE)
    machine.require_memory(f"scaling to {short(edges)} edges", needed)


def measure(options: argparse.Namespace, report: Report) -> None:
    """Every kind and size, from small to large."""
    shape, sizes = options.shape or DEFAULT_SHAPE, _sizes(options)
    kinds = ("random", "local") if options.graph in ("arxiv", "random") else (options.graph,)
    report.start(len(kinds) * len(sizes))
    for kind in kinds:
        rows = []
        for edges in sizes:
            text = f"{kind}, {short(edges)} edges"
            report.say(f"{text}: graph")
            graph = graphs.load(kind, nodes=round(edges / graphs.edges_per_node()))
            report.say(text)
            if edges > CHECK_UP_TO or _agrees(graph, kind, shape, report):
                rows += _time(graph, kind, shape, options.rounds or 5, report)
            report.done()
        report.rows += rows
        passes: dict[str, list[Row]] = {}
        for row in rows:
            passes.setdefault(row["competitor"], []).append(row)
        if rows:
            _print(kind, shape, passes)
        _figures(kind, passes, report)
    report.close()
    if options.out:
        plot_time_per_edge(report.rows, options.out / "scaling_time_per_edge.png")


def short(edges: int) -> str:
    """One digit and the power of ten, `6e7`."""
    mantissa, exponent = f"{edges:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _sizes(options: argparse.Namespace) -> tuple[int, ...]:
    if options.nodes:
        return (round(options.nodes * graphs.edges_per_node()),)
    return QUICK_EDGES if options.quick else EDGES


def bytes_needed(edges: int, shape: Shape) -> int:
    """At the peak of building the graph or of a backward pass, whichever is more."""
    nodes = edges / graphs.edges_per_node()
    # The tables of all passes are there at once, since their rounds are interleaved.
    passes = edges * 48 + nodes * 4 * (10 * shape.channels + 5 * shape.attention_channels)
    return round(max(edges * graphs.BUILDING_BYTES, passes))


def _agrees(graph: Graph, kind: str, shape: Shape, report: Report) -> bool:
    for module in (bench_attention_diffusion, bench_csr_diffusion):
        problem = module.setup(graph, shape)
        try:
            check("grand-fast", module.ours(problem), problem, expected(problem))
        except AssertionError as difference:
            report.failed.append(f"{kind}, {graph}: {difference}")
            return False
    return True


def _time(graph: Graph, kind: str, shape: Shape, rounds: int, report: Report) -> list[Row]:
    calls = attention_passes(graph, shape) | csr_passes(graph, shape.channels)
    calls["row gather floor"] = machine.gather_call(graph, shape.channels)
    timings = interleave(calls, rounds=rounds, tick=report.say)
    common = {"op": "scaling", "graph": kind, "shape": str(shape), "nodes": graph.num_nodes,
              "edges": graph.num_edges}  # fmt: skip
    return [
        common | {"competitor": name, "ns_per_edge": timing.median * 1e9 / graph.num_edges}
        | timing.record()
        for name, timing in timings.items()
    ]  # fmt: skip


def _print(kind: str, shape: Shape, passes: dict[str, list[Row]]) -> None:
    head = [f"E = {row['edges']:.2g}" for row in next(iter(passes.values()))]
    cells = [[name, *map(cell("ns_per_edge", "{:.1f}"), rows)] for name, rows in passes.items()]
    print_table(f"{kind}, d/H/d_att = {shape}", ["ns per edge", *head], cells)


def _figures(kind: str, passes: dict[str, list[Row]], report: Report) -> None:
    for name, sizes in passes.items():
        small, large = sizes[0], sizes[-1]
        if large is not small:
            growth = large["ns_per_edge"] / small["ns_per_edge"]
            text = f"{short(large['edges'])} edges over {short(small['edges'])}"
            report.figure(f"{kind}: {name}, ns per edge, {text}", growth, "×")
