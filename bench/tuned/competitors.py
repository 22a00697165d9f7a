"""Who competes on the tuned configurations, and what they are checked against."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from bench.core.check import named
from bench.core.configurations import BY_DATASET, load_graph
from bench.core.problem import OURS, Function, gradients
from bench.peers.released import released_attention_csr_product, released_sequence
from bench.tuned.problem import TunedProblem, ours, setup

__all__ = ["BY_DATASET", "COMPETITORS", "RELEASED", "expected", "load_graph", "setup"]

RELEASED = "released sequence"
COMPETITORS: dict[str, Callable[[TunedProblem], Function]] = {
    OURS: ours,
    RELEASED: released_sequence,
    "released, MKL's product": released_attention_csr_product,
}


def expected(problem: TunedProblem) -> dict[str, Tensor]:
    """Output and gradients of the released sequence in float64: it shares no code with ours."""
    wide = replace(
        problem,
        inputs={name: t.double() for name, t in problem.inputs.items()},
        d_out=problem.d_out.double(),
    )
    return named(problem, *gradients(released_attention_csr_product(wide), wide))
