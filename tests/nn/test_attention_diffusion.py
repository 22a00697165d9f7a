import copy
import io
import math

import pytest
import torch

import grand_fast as gf
from grand_fast.nn import AttentionDiffusion
from grand_fast.testing import assert_close, random_graph


def dense(layer, x, graph, x0=None):
    """The layer's formula on an N×N matrix per head."""
    n, heads = graph.num_nodes, layer.heads
    count = torch.zeros(n, n, dtype=x.dtype)
    sender, receiver = graph.edge_index()
    count.index_put_((receiver, sender), torch.ones(graph.num_edges, dtype=x.dtype), True)
    q = layer.query(x).view(n, heads, -1)
    k = layer.key(x).view(n, heads, -1)
    s = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(q.shape[2])
    p = torch.exp(s) * count
    a = p / p.sum(2, keepdim=True).clamp_min(1e-300)
    alpha = layer.scale.alpha
    f = alpha * (a.mean(0) @ x - x)
    return f if x0 is None else f + layer.scale.beta * x0


@pytest.mark.parametrize("source", [False, True])
def test_against_dense(backend, source):
    graph = random_graph("repeated")
    layer = AttentionDiffusion(6, 8, heads=2, source=source).double()
    if source:
        torch.nn.init.constant_(layer.scale.beta, 0.7)
    x = torch.randn(graph.num_nodes, 6, dtype=torch.float64)
    x0 = torch.randn_like(x) if source else None
    with gf.backend(backend):
        f = layer(x, graph, x0)
        got = torch.autograd.grad(f.square().sum(), list(layer.parameters()))
    want_f = dense(layer, x, graph, x0)
    want = torch.autograd.grad(want_f.square().sum(), list(layer.parameters()))
    assert_close("f", f, want_f)
    for (name, _), a, b in zip(layer.named_parameters(), got, want, strict=True):
        if name == "key.bias":  # the same for every sender of a row: it cancels
            assert a.abs().max() < 1e-12 and b.abs().max() < 1e-12
        else:
            assert_close(name, a, b, tolerance=1e-11)


def test_attention_is_in_the_users_order():
    graph = random_graph("random")
    layer = AttentionDiffusion(4, heads=2)
    x = torch.randn(graph.num_nodes, 4)
    a = layer.attention(x, graph)
    assert a.shape == (graph.num_edges, 2)
    sums = torch.zeros(graph.num_nodes, 2).index_add(0, graph.edge_index()[1], a)
    has_edges = graph.rowptr.diff() > 0
    assert_close("sums", sums[has_edges], torch.ones_like(sums)[has_edges])


def test_alpha():
    layer = AttentionDiffusion(4)
    assert float(layer.scale.alpha) == 0.5
    assert AttentionDiffusion(4, alpha=0.25).scale.alpha == 0.25
    assert len(list(AttentionDiffusion(4, alpha=0.25).parameters())) == 4


def test_state_dict_copy_and_repr():
    layer = AttentionDiffusion(4, 6, heads=3, source=True)
    assert "heads=3" in repr(layer) and "alpha=learned" in repr(layer)
    twin = AttentionDiffusion(4, 6, heads=3, source=True)
    twin.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    graph, x = random_graph("random"), torch.randn(40, 4)
    want = layer(x, graph, x)
    for other in (twin, copy.deepcopy(layer), loaded):
        assert torch.equal(other(x, graph, x), want)
    twin.reset_parameters()
    assert not torch.equal(twin.query.weight, layer.query.weight)


def test_bad_input():
    with pytest.raises(ValueError, match="`heads` must divide attention_channels=6, got 4"):
        AttentionDiffusion(6, heads=4)
    with pytest.raises(TypeError, match="alpha"):
        AttentionDiffusion(6, alpha="fixed")
    graph, x = random_graph("random"), torch.randn(40, 6)
    with pytest.raises(ValueError, match="x0"):
        AttentionDiffusion(6)(x, graph, x)
    with pytest.raises(ValueError, match="x0"):
        AttentionDiffusion(6, source=True)(x, graph)
