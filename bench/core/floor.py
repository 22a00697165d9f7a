"""The least that an operator costs on this machine: its row gathers and its projections.

Forward reads one row of x, or of k, or both, per edge. Backward cannot do with fewer than two
passes (rows of A, rows of Aᵀ), each of which reads as much again. Projections are arithmetic alone,
at the multiply-add peak of this machine in this run: 4·N·d·d_att flops forward (q and k), twice
that backward (x, and the weights). Where nothing is gathered, the bytes of the operator at the
speed of a copy are the floor, and as many again backward.
"""

from collections.abc import Callable

from bench.core import machine
from bench.core.harness import Timing
from bench.core.problem import Mode, Problem

GATHERED = {
    "attention_diffusion": ("x", "k"),
    "attention_product": ("x", "k"),  # x: its values, as wide
    "csr_diffusion": ("x",),
    "edge_attention": ("k",),
    "edge_softmax": (),
    "spmm": ("x",),
    "stage_update": (),
}


def calls(problem: Problem) -> dict[str, Callable[[], object]]:
    """What to time beside the competitors."""
    gathers = {
        f"gather of {name} rows": machine.gather_call(problem.graph, width)
        for name, width in _widths(problem).items()
    }
    return gathers | {"multiply-adds": machine.multiply_add_call(), "copy": machine.copy_call()}


def rates(problem: Problem, timings: dict[str, Timing]) -> dict[str, float]:
    """What the machine gave, from the timings of `calls`."""
    gathered = sum(machine.gather_bytes(problem.graph, w) for w in _widths(problem).values())
    return {
        "copy_gb_per_s": 2 * machine.COPY_BYTES / timings["copy"].median / 1e9,
        "gather_gb_per_s": gathered / _gathers(timings) / 1e9 if gathered else 0.0,
        "multiply_add_gflop_per_s": machine.MULTIPLY_ADD_FLOPS
        / timings["multiply-adds"].median
        / 1e9,
    }


def seconds(problem: Problem, timings: dict[str, Timing]) -> dict[Mode, float]:
    """The floor of each mode, from the timings of `calls`."""
    if not problem.gathers:
        moved = problem.cost.bytes_min / (2 * machine.COPY_BYTES) * timings["copy"].median
        return {"forward": moved, "forward+backward": 2 * moved}
    gathers = _gathers(timings)
    projections = 0.0
    if problem.op == "attention_diffusion":
        shape = problem.shape
        flops = 4 * problem.graph.num_nodes * shape.channels * shape.attention_channels
        projections = flops * timings["multiply-adds"].median / machine.MULTIPLY_ADD_FLOPS
    return {"forward": gathers + projections, "forward+backward": 3 * (gathers + projections)}


def _widths(problem: Problem) -> dict[str, int]:
    widths = {"x": problem.shape.channels, "k": problem.shape.attention_channels}
    return {name: widths[name] for name in GATHERED[problem.op]}


def _gathers(timings: dict[str, Timing]) -> float:
    return sum(t.median for name, t in timings.items() if name.startswith("gather"))
