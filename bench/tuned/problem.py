"""One evaluation of the right-hand side of a tuned configuration: x → projections → f.

Who competes on it, and what they are checked against.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

import grand_fast as gf
from bench.core import fresh, graphs
from bench.core.check import named
from bench.core.configurations import BY_DATASET, Configuration, load_graph
from bench.core.problem import MODES, OURS, Differentiated, Function, Mode, gradients, runner
from bench.peers.released import (
    PARAMETERS,
    SparseProduct,
    gathered_product,
    released_edge_attention,
)
from bench.peers.sparse import GraphArrays, csr_product, mkl

OPTIONS = ("score", "normalizer", "normalize", "source")  # of a layer, as configurations have them


@dataclass(frozen=True)
class TunedProblem(Differentiated):
    """A configuration on a graph. Inputs: the state x and the parameters of `layer`.

    The source x0 is no input: the released code detaches it.
    """

    configuration: Configuration
    graph: gf.Graph
    layer: gf.nn.AttentionDiffusion
    x0: Tensor | None


def setup(configuration: Configuration, graph: gf.Graph, *, seed: int = 0) -> TunedProblem:
    """Random features as wide as the state, and a layer as it is built, but for beta = 1/2."""
    torch.manual_seed(seed)
    n, shape = graph.num_nodes, configuration.shape
    layer = gf.nn.AttentionDiffusion(
        shape.channels,
        shape.attention_channels,
        shape.heads,
        **{key: getattr(configuration, key) for key in OPTIONS},
    )
    if layer.scale.beta is not None:
        torch.nn.init.constant_(layer.scale.beta, 0.5)
    parameters = {PARAMETERS[name]: p.detach() for name, p in layer.named_parameters()}
    return TunedProblem(
        inputs={"x": torch.randn(n, shape.channels)} | parameters,
        d_out=torch.randn(n, shape.channels),
        configuration=configuration,
        graph=graph,
        layer=layer,
        x0=torch.randn(n, shape.channels) if configuration.source else None,
    )


def ours(problem: TunedProblem) -> Function:
    """The layer itself."""
    graphs.prepare(problem.graph)
    names = [name for name, _ in problem.layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        x0 = None if problem.x0 is None else problem.x0.to(x.dtype)
        f: Tensor = functional_call(problem.layer, given, (x, problem.graph, x0))
        return f

    return function


def released_sequence(problem: TunedProblem, product: SparseProduct | None = None) -> Function:
    """As it is: with torch_sparse's product, a row per edge; or with another product."""
    ends = problem.graph.edge_index().flip(0)
    attention = released_edge_attention(problem.configuration, *ends)
    product = product or gathered_product(*ends)
    names = list(problem.inputs)

    def function(*inputs: Tensor) -> Tensor:
        given = dict(zip(names, inputs, strict=True))
        x = given["x"]
        f = torch.sigmoid(given["alpha"]) * (product(attention(x, given), x) - x)
        return f if problem.x0 is None else f + given["beta"] * problem.x0.to(x.dtype)

    return function


def released_attention_csr_product(problem: TunedProblem) -> Function:
    """With MKL's product and a backward by hand: nothing of size E·d."""
    arrays, slots = GraphArrays(problem.graph), problem.graph.perm.long()

    def product(a: Tensor, x: Tensor) -> Tensor:
        return csr_product(x, a[slots], arrays, mkl(x.shape[1]))

    return released_sequence(problem, product)


RELEASED = "released sequence"
COMPETITORS: dict[str, Callable[[TunedProblem], Function]] = {
    OURS: ours,
    RELEASED: released_sequence,
    "released, MKL's product": released_attention_csr_product,
}


def expected(problem: TunedProblem) -> dict[str, Tensor]:
    """Output and gradients of the released sequence in float64: it shares no code with ours."""
    wide = problem.double()
    return named(problem, *gradients(released_attention_csr_product(wide), wide))


def peak_memory(dataset: str, competitor: str, mode: Mode) -> dict[str, float]:
    """Bytes above inputs and graph at the peak of one evaluation; in a fresh process."""
    configuration, make = BY_DATASET[dataset], COMPETITORS[competitor]
    tiny = setup(configuration, graphs.load("random", nodes=fresh.TINY_NODES))
    for each in MODES:
        runner(make(tiny), tiny, each)()
    problem = setup(configuration, load_graph(configuration))
    return fresh.peak(runner(make(problem), problem, mode))
