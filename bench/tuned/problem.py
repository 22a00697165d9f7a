"""One evaluation of the right-hand side of a tuned configuration: x → projections → f."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

import grand_fast as gf
from bench.core.configurations import Configuration
from bench.core.problem import Differentiated, Function
from grand_fast.ops.backends import plan

# The layer's parameters, as the inputs are called.
INPUTS = {
    "query.weight": "W_q",
    "query.bias": "b_q",
    "key.weight": "W_k",
    "key.bias": "b_k",
    "sigma": "sigma",
    "lengthscale": "lengthscale",
    "scale.alpha_logit": "alpha",
    "scale.beta": "beta",
}


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
        score=configuration.score,
        normalizer=configuration.normalizer,
        normalize=configuration.normalize,
        source=configuration.source,
    )
    if layer.scale.beta is not None:
        torch.nn.init.constant_(layer.scale.beta, 0.5)
    parameters = {INPUTS[name]: p.detach() for name, p in layer.named_parameters()}
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
    for transposed in (False, True):
        problem.graph.csr(plan("cpu"), transposed=transposed)  # or the first call does it
    names = [name for name, _ in problem.layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        x0 = None if problem.x0 is None else problem.x0.to(x.dtype)
        f: Tensor = functional_call(problem.layer, given, (x, problem.graph, x0))
        return f

    return function
