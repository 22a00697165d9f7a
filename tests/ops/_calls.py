"""Each operator as a function of tensors, for the tests that ask what PyTorch can do with it."""

import torch

from grand_fast import ops
from grand_fast.graph import Graph

from ._problems import normal


def attention(graph, x, q, k, alpha, beta, x0, y, **_):
    add = [(0.5, x), (2.0, y)]
    return ops.attention_diffusion(x, q, k, graph, alpha=alpha, beta=beta, x0=x0, add=add)


def bare_attention(graph, x, q, k, **_):
    return ops.attention_diffusion(x, q, k, graph)


def attention_product(graph, x, q, k, a, **_):
    values, edge_key = x[:, None].expand(-1, 2, -1), a[:, None, None].expand(-1, 2, 3)
    return ops.attention_product(values, q, k, graph, edge_key=edge_key, edge_weight=a)


def edges(graph, q, k, **_):
    return ops.edge_attention(q, k, graph)


def softmax(graph, a, **_):
    return ops.edge_softmax(a, graph, normalizer="squareplus", normalize="sender")


def diffusion(graph, x, a, alpha, beta, x0, y, **_):
    add = [(0.5, x), (2.0, y)]
    return ops.csr_diffusion(x, a, graph, alpha=alpha, beta=beta, x0=x0, add=add)


def product(graph, x, a, **_):
    return ops.spmm(graph, torch.stack([a, -2.0 * a], 1), x)


def product_by_head(graph, q, a, **_):
    return ops.spmm(graph, torch.stack([a, -2.0 * a], 1), q)


def projected(graph, x, weight, bias, alpha, beta, x0, y, **_):
    return ops.projected_attention_diffusion(
        x, weight, bias, graph, heads=2, alpha=alpha, beta=beta, x0=x0, add=[(0.5, x), (2.0, y)]
    )


def stage(graph, x, y, x0, **_):
    return ops.stage_update([(1.0, x), (0.5, y), (-2.0, x0)])


CALLS = {
    "attention_diffusion": attention,
    "bare": bare_attention,
    "attention_product": attention_product,
    "edge_attention": edges,
    "edge_softmax": softmax,
    "csr_diffusion": diffusion,
    "spmm": product,
    "spmm by head": product_by_head,
    "projected_attention_diffusion": projected,
    "stage_update": stage,
}


def tensors(
    graph: Graph, dtype: torch.dtype = torch.float32, *, d: int = 5
) -> dict[str, torch.Tensor]:
    """What the calls take; leaves that require gradients."""
    n, heads, d_k = graph.num_nodes, 2, 3
    shapes = {
        "x": (n, d), "q": (n, heads, d_k), "k": (n, heads, d_k), "x0": (n, d), "y": (n, d),
        "alpha": (d,), "beta": (), "a": (graph.num_edges,),
        "weight": (2 * heads * d_k, d), "bias": (2 * heads * d_k,),
    }  # fmt: skip
    return {
        name: normal(*shape, seed=seed).to(dtype).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    }


def gradients(out, inputs):
    """By every input, None where it has no part in `out`."""
    return torch.autograd.grad(out.square().sum(), list(inputs), allow_unused=True)
