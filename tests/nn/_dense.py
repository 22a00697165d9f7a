"""Attention and Laplacian on N×N matrices, in the plainest operations there are."""

import math

import torch

import grand_fast as gf
from grand_fast.testing import random_edge_index


def dense_scores(layer, x):
    """`s [H, N, N]` of every pair of nodes, receivers in rows."""
    n, heads = x.shape[0], layer.heads
    if layer.score == "gat" or isinstance(layer.score, gf.ops.GAT):
        w = layer.shared(x).view(n, heads, -1)
        own_q, own_k = (torch.einsum("hc,nhc->hn", a, w) for a in (layer.a_query, layer.a_key))
        slope = 0.2 if layer.score == "gat" else layer.score.negative_slope
        return torch.nn.functional.leaky_relu(own_q[:, :, None] + own_k[:, None], slope)
    q = layer.query(x).view(n, heads, -1).transpose(0, 1)[:, :, None]
    k = layer.key(x).view(n, heads, -1).transpose(0, 1)[:, None]
    if layer.score == "scaled_dot":
        return (q * k).sum(3) / math.sqrt(q.shape[3])
    if layer.score == "cosine":
        return torch.cosine_similarity(q, k, dim=3)
    if layer.score == "pearson":
        q, k = (t - t.mean(3, keepdim=True) for t in (q, k))
        return torch.cosine_similarity(q, k, dim=3)
    of = layer if layer.score == "exp_kernel" else layer.score
    distance = (q - k).square().sum(3)
    return of.sigma**2 * torch.exp(-distance / (2 * of.lengthscale**2))


def dense_attention(layer, x, graph, weight):
    """`A [H, N, N]`, repeated edges added up; `weight [N, N]` of the edges if they have any."""
    n = graph.num_nodes
    count = torch.zeros(n, n, dtype=x.dtype)
    sender, receiver = graph.edge_index()
    count.index_put_((receiver, sender), torch.ones(graph.num_edges, dtype=x.dtype), True)
    s = dense_scores(layer, x)
    s = s if weight is None else s * weight
    if layer.normalizer == "softmax":
        p = torch.exp(s) * count
    else:
        v = s - s[:, count > 0].max()
        p = (v + torch.sqrt(v * v + 4)) / 2 * count
    group = 2 if layer.normalize == "receiver" else 1
    return p / p.sum(group, keepdim=True).clamp_min(1e-300)


def dense_field(layer, a, x, x0=None):
    """`alpha (mean_h A^h x − x) + beta x0` of `a [H, N, N]`; or of the heads' own values."""
    if layer.mix_features:
        v = layer.value(x).view(x.shape[0], layer.heads, -1)
        ax = layer.out(torch.einsum("hij,jhc->ihc", a, v).mean(1))
    else:
        ax = a.mean(0) @ x
    f = layer.scale.alpha * (ax - x)
    return f if x0 is None else f + layer.scale.beta * x0


def weighted_graph(kind):
    """A random graph, and the weights `[N, N]` that those of its edges are from."""
    edges, n = random_edge_index(kind)
    weight = 0.5 + torch.rand(n, n, dtype=torch.float64)
    return gf.Graph.from_edge_index(edges, n, weight[edges[1], edges[0]]), weight


def dense_random_walk(graph, weight=None):
    """`[N, N]`: rows of `count · weight` that sum to one, or are 0."""
    n = graph.num_nodes
    a = torch.zeros(n, n, dtype=torch.float64)
    sender, receiver = graph.edge_index()
    ones = torch.ones(graph.num_edges, dtype=a.dtype)
    a.index_put_((receiver, sender), ones if weight is None else weight[receiver, sender], True)
    total = a.sum(1, keepdim=True)
    return a / torch.where(total == 0, 1.0, total)
