"""What the suite solves: GRAND-nl from x and the weights of its projections to x(T), and peers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchdiffeq
from torch import Tensor

import grand_fast as gf
from bench.core import fresh, graphs
from bench.core.problem import Function, Problem, Shape, runner
from bench.ops import bench_attention_diffusion
from bench.peers.sampled import sampled_attention_diffusion
from bench.peers.unfused import diffusion_by, released_attention
from grand_fast.nn import AttentionDiffusion
from grand_fast.nn.terms import NonlinearDiffusion

STEP = 1.0  # of all fixed steps whose cost is measured, in units of t with alpha = 1
METHOD = "rk4"
STAGES = 4  # its evaluations a step


def setup(graph: gf.Graph, shape: Shape) -> Problem:
    """Random features and projections, as the suite `ops` draws them."""
    graphs.prepare(graph)
    return bench_attention_diffusion.setup(graph, shape)


def nonlinear_term(problem: Problem, *projections: Tensor) -> NonlinearDiffusion:
    """The layer, `alpha = 1`, with the weights and biases of `problem` or these."""
    shape = problem.shape
    layer = AttentionDiffusion(shape.channels, shape.attention_channels, shape.heads, alpha=1.0)
    given = projections or tuple(problem.inputs.values())[1:]
    places = [(linear, key) for linear in (layer.query, layer.key) for key in ("weight", "bias")]
    for (linear, key), value in zip(places, given, strict=True):
        linear._parameters[key] = value  # as it is, whether or not a leaf
    return NonlinearDiffusion(layer, problem.graph, None)


def ours(adjoint: gf.solvers.Adjoint, memory_limit: int | None = None) -> "Make":
    """`integrate` over the layer's own term, one fused operator a stage."""

    def make(problem: Problem, steps: int) -> Function:
        def solve(x: Tensor, *projections: Tensor) -> Tensor:
            term = nonlinear_term(problem, *projections)
            return gf.integrate(
                term, x, steps * STEP, method=METHOD, step_size=STEP, adjoint=adjoint,
                memory_limit=memory_limit,
            ).x  # fmt: skip

        return solve

    return make


def torchdiffeq_over(right_hand_side: Callable[[Problem], Function]) -> "Make":
    """torchdiffeq's odeint, the same method and steps, over a form of f in PyTorch."""

    def make(problem: Problem, steps: int) -> Function:
        f = right_hand_side(problem)
        times = torch.tensor([0.0, steps * STEP])

        def solve(x: Tensor, *projections: Tensor) -> Tensor:
            states: Tensor = torchdiffeq.odeint(
                lambda t, y: f(y, *projections), x, times, method=METHOD,
                options={"step_size": STEP},
            )  # fmt: skip
            return states[-1]

        return solve

    return make


Make = Callable[[Problem, int], Function]  # of the number of steps


@dataclass(frozen=True)
class Solver:
    """A way to solve. `edge_floats`: floats an edge that it keeps of each evaluation of f."""

    make: Make
    is_ours: bool = False
    edge_floats: Callable[[Shape], int] = lambda shape: 0

    def bytes_needed(self, problem: Problem, steps: int) -> int:
        """Estimated peak above the inputs: what is kept, and what backward writes beside it."""
        per_edge = (STAGES * steps + 2.5) * self.edge_floats(problem.shape)
        per_node = 5 * STAGES * steps * problem.shape.channels
        edges, nodes = problem.graph.num_edges, problem.graph.num_nodes
        return round(4 * (edges * per_edge + (0 if self.is_ours else nodes * per_node)))


DIRECT, CHECKPOINT = "grand-fast, direct", "grand-fast, checkpoint"
STRONGEST = "torchdiffeq, strongest PyTorch form of f"
RELEASED = "torchdiffeq, released sequence"
SOLVERS = {
    DIRECT: Solver(ours("direct"), is_ours=True),
    CHECKPOINT: Solver(ours("checkpoint"), is_ours=True),
    STRONGEST: Solver(
        torchdiffeq_over(sampled_attention_diffusion), edge_floats=lambda shape: shape.heads + 1
    ),
    RELEASED: Solver(
        torchdiffeq_over(diffusion_by(released_attention)),
        edge_floats=lambda shape: 2 * max(shape.channels, shape.attention_channels),
    ),
}


def peak_memory(
    solver: str, steps: int, shape: Shape, graph: str, nodes: int | None,
    memory_limit: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bytes above inputs and graph at the peak of forward+backward; in a fresh process."""
    make = SOLVERS[solver].make if memory_limit is None else ours("checkpoint", memory_limit)
    tiny = setup(graphs.load("random", nodes=fresh.TINY_NODES), shape)
    runner(SOLVERS[solver].make(tiny, steps), tiny, "forward+backward")()
    problem = setup(graphs.load(graph, nodes=nodes), shape)
    return fresh.peak(runner(make(problem, steps), problem, "forward+backward"))
