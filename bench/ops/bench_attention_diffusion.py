"""attention_diffusion as a user runs it: x → projections → q, k → f, and all gradients."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

import grand_fast as gf
from bench.core import graphs
from bench.core.problem import OURS, Competitor, Function, Problem, Shape
from bench.peers.sampled import sampled_attention_diffusion
from bench.peers.unfused import (
    compiled_reference,
    diffusion_by,
    index_select_attention,
    projected,
    released_attention,
    transformer_conv,
)
from grand_fast.kernels.attention_diffusion.reference import attention_diffusion_fwd, cost
from grand_fast.kernels.csr import Csr


def setup(graph: gf.Graph, shape: Shape, *, seed: int = 0, element_bytes: int = 4) -> Problem:
    n, d, d_att = graph.num_nodes, shape.channels, shape.attention_channels
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g) * std

    std = 1.5 / math.sqrt(d)  # scores with a spread of 2: a softmax neither flat nor one-hot
    inputs = {
        "x": normal(n, d),
        "W_q": normal(d_att, d, std=std),
        "b_q": normal(d_att, std=0.1),
        "W_k": normal(d_att, d, std=std),
        "b_k": normal(d_att, std=0.1),
    }

    def core(x: Tensor, w_q: Tensor, b_q: Tensor, w_k: Tensor, b_k: Tensor) -> tuple[Tensor, ...]:
        return x, *projected(shape.heads, x, w_q, b_q, w_k, b_k)

    def reference(csr: Csr, core: Sequence[Tensor]) -> Tensor:
        x, q, k = core
        alpha = x.new_ones(d)
        return attention_diffusion_fwd(x, q, k, alpha=alpha, beta=None, x0=None, csr=csr)[0]

    sizes = {"n": n, "e": graph.num_edges, "d": d, "h": shape.heads, "d_k": shape.d_k}
    return Problem(
        op="attention_diffusion",
        graph=graph,
        shape=shape,
        inputs=inputs,
        d_out=normal(n, d),
        cost=cost(**sizes, element_bytes=element_bytes),
        core=core,
        reference=reference,
    )


def packed_projection(problem: Problem, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, and q and k as strided views of one product, not copied."""
    x, w_q, b_q, w_k, b_k = inputs
    qk = linear(x, torch.cat([w_q, w_k]), torch.cat([b_q, b_k]))
    q, k = qk.view(x.shape[0], 2, problem.shape.heads, -1).unbind(1)
    return x, q, k


def ours(problem: Problem) -> Function:
    graphs.prepare(problem.graph)

    def function(x: Tensor, w_q: Tensor, b_q: Tensor, w_k: Tensor, b_k: Tensor) -> Tensor:
        weight, bias = torch.cat([w_q, w_k]), torch.cat([b_q, b_k])
        return gf.ops.projected_attention_diffusion(
            x, weight, bias, problem.graph, heads=problem.shape.heads
        )

    return function


def _rows(count: int) -> Callable[[Shape], int]:
    """Floats of so many rows per edge, as wide as the state or as queries and keys."""
    return lambda shape: count * max(shape.channels, shape.attention_channels)


COMPETITORS = (
    Competitor(OURS, ours),
    Competitor("sampled_addmm + CSR", sampled_attention_diffusion, lambda s: 3 * s.heads + 8),
    Competitor("released sequence", diffusion_by(released_attention), _rows(4), slow=True),
    Competitor("index_select + softmax(ptr)", diffusion_by(index_select_attention), _rows(4),
               slow=True),
    Competitor("torch.compile", compiled_reference, _rows(3), slow=True),
    Competitor("TransformerConv (nearest)", transformer_conv, lambda s: 7 * s.attention_channels,
               exact=False, slow=True),
)  # fmt: skip
