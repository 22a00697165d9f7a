"""The least that an operator costs on this machine: its row gathers and its projections.

Forward reads one row of x, or of k, or both, per edge. Backward cannot do with fewer than two
passes (rows of A, rows of Aᵀ), each of which reads as much again. Projections are torch's GEMMs.
"""

from collections.abc import Callable

import torch

from bench import machine
from bench.harness import Timing
from bench.problem import Mode, Problem

GATHERED = {
    "attention_diffusion": ("x", "k"),
    "csr_diffusion": ("x",),
    "edge_attention": ("k",),
}


def calls(problem: Problem) -> dict[str, Callable[[], object]]:
    """What to time beside the competitors."""
    shape, graph = problem.shape, problem.graph
    widths = {"x": shape.channels, "k": shape.attention_channels}
    needed = {
        f"gather of {name} rows": machine.gather_call(graph, widths[name])
        for name in GATHERED[problem.op]
    }
    if problem.op == "attention_diffusion":
        x = problem.inputs["x"]
        weight = torch.cat([problem.inputs["W_q"], problem.inputs["W_k"]])
        dqk = x.new_ones(x.shape[0], weight.shape[0])
        needed["projections"] = lambda: x @ weight.t()
        needed["backward of projections"] = lambda: (dqk @ weight, dqk.t() @ x)
    return needed


def seconds(timings: dict[str, Timing]) -> dict[Mode, float]:
    """The floor of each mode, from the timings of `calls`."""
    gathers = sum(t.median for name, t in timings.items() if name.startswith("gather"))
    forward = backward = 0.0
    if "projections" in timings:
        forward = timings["projections"].median
        backward = timings["backward of projections"].median
    return {"forward": gathers + forward, "forward+backward": 3 * gathers + forward + backward}
