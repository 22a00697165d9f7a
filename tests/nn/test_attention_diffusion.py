import copy
import io

import pytest
import torch

import grand_fast as gf
from grand_fast.nn import AttentionDiffusion
from grand_fast.testing import assert_close, random_graph

from ._dense import dense_attention, dense_field, weighted_graph


def dense(layer, x, graph, x0=None, weight=None):
    """The layer's formula on an N×N matrix per head."""
    return dense_field(layer, dense_attention(layer, x, graph, weight), x, x0)


LAYERS = {
    "paper": {},
    "source": {"source": True},
    "per_channel": {"source": True, "per_channel": True},
    "cosine": {"score": "cosine", "normalizer": "squareplus"},
    "pearson": {"score": "pearson", "normalize": "sender"},
    "exp_kernel": {"score": "exp_kernel", "normalizer": "squareplus", "normalize": "sender"},
    "fixed_exp_kernel": {"score": gf.ops.ExpKernel(1.3, 0.7)},
    "gat": {"score": "gat"},
    "gat_object": {"score": gf.ops.GAT(0.1), "normalizer": "squareplus"},
    "weights": {"reweight": True},
    "weights_squareplus": {"reweight": True, "normalizer": "squareplus", "normalize": "sender"},
    "mix": {"mix_features": True, "source": True},
    "mix_exp_kernel": {"mix_features": True, "score": "exp_kernel", "normalize": "sender"},
    "mix_gat_squareplus": {"mix_features": True, "score": "gat", "normalizer": "squareplus"},
    "mix_weights": {"mix_features": True, "reweight": True, "normalizer": "squareplus",
                    "normalize": "sender", "per_channel": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["repeated", "empty_rows"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_against_dense(backend, options, kind):
    graph, weight = weighted_graph(kind)
    n = graph.num_nodes
    layer = AttentionDiffusion(6, 8, heads=2, **options).double()
    for parameter in (p for p in layer.parameters() if p.dim() < 2):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(n, 6, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn_like(x, requires_grad=True) if options.get("source") else None
    leaves = [t for t in (x, x0) if t is not None] + list(layer.parameters())
    with gf.backend(backend):
        f = layer(x, graph, x0)
        got = torch.autograd.grad(f.square().sum(), leaves)
    want_f = dense(layer, x, graph, x0, weight if layer.reweight else None)
    want = torch.autograd.grad(want_f.square().sum(), leaves)
    assert_close("f", f, want_f)
    # Together: a bias that cancels in the softmax has a gradient of rounding errors alone
    got, want = (torch.cat([g.flatten() for g in grads]) for grads in (got, want))
    assert_close("gradients", got, want, tolerance=1e-11)


@pytest.mark.parametrize("mix_features", [False, True])
def test_added_in_the_same_call(backend, mix_features):
    graph = random_graph("random")
    layer = AttentionDiffusion(4, heads=2, mix_features=mix_features, source=True).double()
    torch.nn.init.constant_(layer.scale.beta, 0.7)
    x, x0, y = torch.randn(3, 40, 4, dtype=torch.float64)
    with gf.backend(backend):
        got = layer(x, graph, x0, scale=0.5, add=[(2.0, y), (1.0, x)])
        assert_close("sum", got, 0.5 * layer(x, graph, x0) + 2 * y + x)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_saves_nothing_of_edge_size(options):
    graph = random_graph("hub")
    layer = AttentionDiffusion(6, 8, heads=2, **{**options, "reweight": False})
    x = torch.randn(graph.num_nodes, 6, requires_grad=True)
    sizes = []

    def pack(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, graph, x if layer.scale.beta is not None else None)
    assert sizes and max(sizes) < graph.num_edges / 2


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
    assert AttentionDiffusion(4, per_channel=True).scale.alpha.tolist() == [0.5] * 4


def test_exp_kernel_learns_its_values_unless_it_is_given_as_an_object():
    learned = dict(AttentionDiffusion(4, score="exp_kernel").named_parameters())
    assert learned["sigma"].tolist() == learned["lengthscale"].tolist() == [1.0]
    fixed = dict(AttentionDiffusion(4, score=gf.ops.ExpKernel(2.0)).named_parameters())
    assert set(fixed) == set(learned) - {"sigma", "lengthscale"}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_state_dict_copy_and_repr(options):
    layer = AttentionDiffusion(4, 6, heads=3, **options)
    assert "heads=3" in repr(layer) and "alpha=learned" in repr(layer)
    twin = AttentionDiffusion(4, 6, heads=3, **options)
    twin.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    graph, x = random_graph("random"), torch.randn(40, 4)
    x0 = x if layer.scale.beta is not None else None
    want = layer(x, graph, x0)
    for other in (twin, copy.deepcopy(layer), loaded):
        assert torch.equal(other(x, graph, x0), want)
    twin.reset_parameters()
    start = {"sigma", "lengthscale", "scale.alpha_logit", "scale.beta"}
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name)) == (name in start), name


def test_bad_input():
    with pytest.raises(ValueError, match="`heads` must divide attention_channels=6, got 4"):
        AttentionDiffusion(6, heads=4)
    for name, choice in (("score", "dot"), ("normalizer", "l1"), ("normalize", "rows")):
        with pytest.raises(ValueError, match=f"AttentionDiffusion: `{name}` must be one of"):
            AttentionDiffusion(6, **{name: choice})
    with pytest.raises(TypeError, match="AttentionDiffusion: `score` must be one of"):
        AttentionDiffusion(6, score=torch.exp)
    with pytest.raises(TypeError, match="alpha"):
        AttentionDiffusion(6, alpha="fixed")
    graph, x = random_graph("random"), torch.randn(40, 6)
    with pytest.raises(ValueError, match="x0"):
        AttentionDiffusion(6)(x, graph, x)
    with pytest.raises(ValueError, match="x0"):
        AttentionDiffusion(6, source=True)(x, graph)


@pytest.mark.parametrize("mix_features", [False, True])
def test_a_state_that_does_not_fit_the_graph(mix_features):
    """Kernels read a row for every node, so such a call must not reach them."""
    graph, x = random_graph("random"), torch.randn(40, 6)
    layer = AttentionDiffusion(6, heads=2, mix_features=mix_features, source=True)
    for wrong in (x[:5], x[:, :4], x[0]):
        with pytest.raises(ValueError, match=r"`x` must have shape \[N, channels\] = \[40, 6\]"):
            layer(wrong, graph, x)
        with pytest.raises(ValueError, match=r"`x0` must have shape \[N, channels\] = \[40, 6\]"):
            layer(x, graph, wrong)
        with pytest.raises(ValueError, match=r"`x` must have shape \[N, channels\] = \[40, 6\]"):
            layer.attention(wrong, graph)
    with pytest.raises(TypeError, match="`graph` must be a Graph"):
        layer(x, graph.edge_index(), x)
