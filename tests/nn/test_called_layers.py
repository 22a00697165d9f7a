"""Layers that are more than their weights: they are called, wherever they stand in a model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import grand_fast as gf
from grand_fast.nn import GRAND, AttentionDiffusion, GRANDConv
from grand_fast.nn._layers import is_plain
from grand_fast.testing import assert_close, random_graph

from ._dense import dense_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
N, D = 40, 6
GRAPH = random_graph("loops")


class LoRA(nn.Module):
    """A frozen layer and a trained correction of low rank."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features).to(base.weight))
        self.up = nn.Parameter(torch.randn(base.out_features, 2).to(base.weight))

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, dtype=base.weight.dtype)
        self.gain = nn.Parameter(torch.full((), 1.5, dtype=base.weight.dtype))

    def forward(self, x):
        return self.gain * super().forward(x)


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp() / 8


class Doubled(torch.Tensor):
    """A subclass of Tensor that counts twice in a product."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not functional.linear:
            return super().__torch_function__(function, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return 2 * function(*args, **(kwargs or {}))


def changed(change):
    def wrap(layer):
        change(layer)
        return layer

    return wrap


def with_forward(layer):
    layer.forward = lambda x: torch.tanh(nn.Linear.forward(layer, x))


def tripled(layer, dx, dy):
    return tuple(None if g is None else 3 * g for g in dx)


def with_doubled_weight(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled))


WRAPPERS = {
    "prune": changed(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "prune rows": changed(lambda m: prune.random_structured(m, "weight", 0.3, dim=0)),
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrisation": changed(
        lambda m: parametrize.register_parametrization(m, "weight", Exponential())
    ),
    "LoRA": LoRA,
    "subclass": Scaled,
    "forward of its own": changed(with_forward),
    "forward hook": changed(lambda m: m.register_forward_hook(lambda m, x, y: 2 * torch.sin(y))),
    "forward pre-hook": changed(lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] ** 2,))),
    "backward hook": changed(lambda m: m.register_full_backward_hook(tripled)),
    "backward pre-hook": changed(
        lambda m: m.register_full_backward_pre_hook(lambda m, dy: (3 * dy[0],))
    ),
    "tensor subclass": changed(with_doubled_weight),
    "without bias": lambda m: nn.Linear(m.in_features, m.out_features, False, dtype=torch.double),
    "more layers": lambda m: nn.Sequential(nn.Tanh(), m, nn.Tanh()),
    "dropout": lambda m: nn.Sequential(nn.Dropout(0.4), m, nn.Dropout(0.2)),
    "batch norm": lambda m: nn.Sequential(m, nn.BatchNorm1d(m.out_features, dtype=torch.double)),
    "lazy": lambda m: nn.LazyLinear(m.out_features, dtype=torch.double),
}
SOME = ("prune", "old spectral_norm", "LoRA")


def conv_by_hand(conv, x):
    """Euler steps on N×N matrices, each evaluation with the buffers as the pass found them."""
    field, h = conv.field, x
    start = {name: b.clone() for name, b in field.named_buffers()}
    after = None

    def evaluate(function, *given):
        nonlocal after
        if after is not None:
            for name, b in field.named_buffers():
                if not torch.equal(b, start[name]):
                    b.data = start[name].clone()
        found = function(*given)
        if after is None:
            after = {name: b.clone() for name, b in field.named_buffers()}
        return found

    def ax_of(h, a):
        if not field.mix_features:
            return a.mean(0) @ h
        v = field.value(h).view(N, field.heads, -1)
        return field.out(torch.einsum("hij,jhc->ihc", a, v).mean(1))

    def slope(h):
        return ax_of(h, dense_attention(field, h, GRAPH, None))

    a = dense_attention(field, x, GRAPH, None) if conv.variant == "l" else None
    for _ in range(int(conv.T)):
        ax = evaluate(slope, h) if a is None else evaluate(ax_of, h, a)
        h = h + field.scale.alpha * (ax - h)
    for name, b in field.named_buffers():
        b.data = after[name]
    return h


def train(model, call, x, steps=2):
    """Outputs, gradients and buffers of some steps of gradient descent."""
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        y = call(x)
        own = [p for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        y.square().sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own]
        with torch.no_grad():
            for p, g in zip(own, grads, strict=True):
                p.sub_(0.01 * g)
        found += [y, torch.cat([g.flatten() for g in grads]), *(b.clone() for b in model.buffers())]
    return found


def compare(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        assert_close("training", got.double(), want.double(), tolerance=1e-9)


PLACES = {
    "query": {},
    "key": {"variant": "l"},
    "shared": {"score": "gat"},
    "value": {"mix_features": True},
    "out": {"mix_features": True, "variant": "l"},
}


def twins(make, *given):
    """Two alike; hooks and tensors that are computed keep modules from being copied."""
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(make())
        found[-1](*given)  # lazy layers are made
    return found


@pytest.mark.parametrize(
    "name, place",
    [(name, "query") for name in WRAPPERS]
    + [(name, place) for name in SOME for place in PLACES if place != "query"],
)
def test_in_the_vector_field(name, place):
    def make():
        conv = GRANDConv(D, heads=2, T=3.0, method="euler", **PLACES[place]).double()
        setattr(conv.field, place, WRAPPERS[name](conv.field.get_submodule(place)))
        return conv

    x = torch.randn(N, D, dtype=torch.float64)
    conv, twin = twins(make, x, GRAPH)
    by_hand = train(twin, lambda x: conv_by_hand(twin, x), x)
    compare(train(conv, lambda x: conv(x, GRAPH), x), by_hand)


@pytest.mark.parametrize(
    "name, kind", [(name, "sparse") for name in WRAPPERS] + [(name, "dense") for name in SOME]
)
def test_in_the_encoder(name, kind):
    def make():
        model = GRAND(D, 4, 3, T=2.0, method="euler", variant="laplacian").double()
        model.encoder = WRAPPERS[name](model.encoder)
        return model

    x = torch.randn(N, D, dtype=torch.float64)
    given = x.to_sparse_csr() if kind == "sparse" else x
    model, twin = twins(make, given, GRAPH)
    a = torch.zeros(N, N, dtype=torch.float64)
    sender, receiver = GRAPH.edge_index()
    a.index_put_((receiver, sender), GRAPH.random_walk_weights(torch.float64), accumulate=True)

    def by_hand(x):
        h = twin.encoder(x)
        for _ in range(2):
            h = h + twin.field.alpha * (a @ h - h)
        return twin.decoder(torch.relu(h))

    compare(train(model, lambda x: model(given, GRAPH), x), train(twin, by_hand, x))


@pytest.mark.parametrize("place", ["decoder", "fc", "hidden", "mlp.layers.0"])
def test_at_other_ends(place):
    model = GRAND(D, 4, 3, T=0.0, mlp=True, fc_out=True, encoder_channels=5)
    seen = []
    model.get_submodule(place).register_forward_hook(lambda m, x, y: seen.append(1))
    model(torch.randn(N, D), GRAPH)
    assert seen == [1]


@pytest.mark.parametrize("name, method", [
    ("spectral_norm", "rk4"),
    ("spectral_norm", "dopri5"),
    ("spectral_norm", "semi_implicit_euler"),
    ("old spectral_norm", "implicit_adams"),
    ("dropout", "rk4"),  # a field that is drawn anew has no steps that adapt to it
    ("batch norm", "dopri5"),
    ("prune", "dopri5"),
    ("LoRA", "dopri5"),
])  # fmt: skip
def test_adjoints_agree(name, method):
    """A step that runs again in backward is the step that was taken."""

    def make():
        conv = GRANDConv(D, method=method, step_size=0.5, rtol=1e-3, atol=1e-3).double()
        conv.field.query = WRAPPERS[name](conv.field.query)
        return conv

    x = torch.randn(N, D, dtype=torch.float64)
    direct, checkpoint = twins(make, x, GRAPH)
    direct.adjoint = "direct"
    want = train(direct, lambda x: direct(x, GRAPH), x)
    compare(train(checkpoint, lambda x: checkpoint(x, GRAPH), x), want)


@pytest.mark.parametrize("wrap", [spectral_norm, parametrizations.spectral_norm])
def test_a_pass_updates_the_vectors_of_a_spectral_norm_once(wrap):
    conv, x = GRANDConv(D, T=2.0), torch.randn(N, D)
    conv.field.query = wrap(conv.field.query)
    one = copy.deepcopy(conv.field.query)
    for _ in range(2):
        one(x)
        conv(x, GRAPH).sum().backward()
        for got, want in zip(conv.field.query.buffers(), one.buffers(), strict=True):
            assert torch.equal(got, want)
    conv.eval()(x, GRAPH)
    for got, want in zip(conv.field.query.buffers(), one.buffers(), strict=True):
        assert torch.equal(got, want)


def test_backward_of_an_earlier_pass_leaves_the_buffers_of_a_later_one():
    conv, x = GRANDConv(D, T=2.0).double(), torch.randn(N, D, dtype=torch.float64)
    conv.field.query = parametrizations.spectral_norm(conv.field.query)
    twin = copy.deepcopy(conv)
    twin.adjoint = "direct"
    losses = [[own(x, GRAPH).square().sum() for _ in range(3)] for own in (conv, twin)]
    for got, want in zip(*losses, strict=True):
        grads = [torch.autograd.grad(loss, list(own.parameters()))
                 for loss, own in ((got, conv), (want, twin))]  # fmt: skip
        for g, w in zip(*grads, strict=True):
            if w.abs().max() > 1e-10:
                assert_close("gradient", g, w, tolerance=1e-10)
    for got, want in zip(conv.buffers(), twin.buffers(), strict=True):
        assert torch.equal(got, want)


def test_hooks_of_every_kind_are_heard_of_each_evaluation():
    conv, x = GRANDConv(D, T=2.0, adjoint="direct"), torch.randn(N, D, requires_grad=True)
    heard = []

    def hear(kind):
        return lambda *given: heard.append(kind)

    handles = [
        conv.field.query.register_forward_hook(hear("forward")),
        conv.field.key.register_forward_pre_hook(hear("before")),
        conv.field.query.register_full_backward_hook(hear("backward")),
        conv.field.key.register_full_backward_pre_hook(hear("before backward")),
        nn.modules.module.register_module_forward_hook(
            lambda m, *given: heard.append("any") if m is conv.field.query else None
        ),
    ]
    conv(x, GRAPH).sum().backward()
    for handle in handles:
        handle.remove()
    kinds = ("forward", "before", "backward", "before backward", "any")
    assert {kind: heard.count(kind) for kind in kinds} == dict.fromkeys(kinds, 8)
    heard.clear()
    conv(x, GRAPH)
    assert heard == [] and is_plain(conv.field.query)


def test_a_global_hook_alone_has_layers_called():
    layer, x, heard = AttentionDiffusion(D), torch.randn(N, D), []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, x: heard.append(m))
    try:
        layer(x, GRAPH)
    finally:
        handle.remove()
    assert layer.query in heard and layer.key in heard


def test_plain_layers_are_read_and_others_called(monkeypatch):
    layer, x, calls = AttentionDiffusion(D), torch.randn(N, D), []
    real = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: calls.append(m) or real(m, x))
    for change, undo in (
        (lambda m: prune.identity(m, "weight"), lambda m: prune.remove(m, "weight")),
        (lambda m: prune.identity(m, "bias"), lambda m: prune.remove(m, "bias")),
        (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
        (weight_norm, nn.utils.remove_weight_norm),
    ):
        want = layer(x, GRAPH)
        assert calls == []
        change(layer.query)
        got = layer(x, GRAPH)
        assert len(calls) == 2
        undo(layer.query)
        calls.clear()
        assert_close("f", got, want.double())


def test_quantised_layers():
    model = GRAND(D, 8, 3, heads=2, T=2.0, method="euler").eval()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(model.field.query) is not nn.Linear
    x = torch.randn(N, D)
    with torch.no_grad():
        h = model.encoder(x)
        for _ in range(2):
            a = dense_attention(model.field, h, GRAPH, None).mean(0)
            h = h + model.field.scale.alpha * (a @ h - h)
        assert_close("logits", model(x, GRAPH), model.decoder(torch.relu(h)).double())


def test_layers_that_do_not_fit():
    layer, x = AttentionDiffusion(D, 8, heads=2), torch.randn(N, D)
    layer.key = nn.Linear(D, 12)
    with pytest.raises(ValueError, match=r"AttentionDiffusion: `key` must be nn.Linear\(6, 8\), "
                       r"like `query`, got nn.Linear\(6, 12\)"):  # fmt: skip
        layer(x, GRAPH)
    layer.key, layer.query = nn.Linear(D, 8), nn.Sequential(nn.Linear(D, 9))
    with pytest.raises(ValueError, match=r"AttentionDiffusion: `query` must return \[N, heads · "
                       r"d_k\] = \[40, 2 · d_k\], got \[40, 9\]"):  # fmt: skip
        layer(x, GRAPH)
    layer.query = nn.Sequential(nn.Linear(D, 12))
    with pytest.raises(ValueError, match="`k` must have shape"):
        layer(x, GRAPH)


def test_other_modules_start_again():
    model = GRAND(D, 4, 3, encoder_channels=5, T=1.0, score="scaled_dot", constant_init=True)
    model.encoder = nn.Sequential(nn.Linear(D, 5, bias=False), nn.Tanh())
    model.hidden = nn.Linear(5, 4, bias=False)
    model.field.query = LoRA(model.field.query)
    before = [model.encoder[0].weight.clone(), model.field.query.base.weight.clone()]
    model.reset_parameters()
    assert not torch.equal(model.encoder[0].weight, before[0])
    assert not torch.equal(model.field.query.base.weight, before[1])
    assert model(torch.randn(N, D), GRAPH).shape == (N, 3)


def test_under_autocast_and_compiled():
    x = torch.randn(N, D)
    conv = GRANDConv(D, T=1.0, method="euler")
    conv.field.query = LoRA(conv.field.query)
    want = conv(x, GRAPH)
    with torch.autocast("cpu", torch.bfloat16):
        got = conv(x, GRAPH)
    assert_close("autocast", got, want.double(), tolerance=5e-2)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert_close("compiled", compiled(x, GRAPH), want.double())
    assert gf.Status.SUCCESS is conv.status


class InBfloat16(nn.Module):
    """A layer of another type, which brings its input there and its output back."""

    def __init__(self, base):
        super().__init__()
        self.base = base.to(torch.bfloat16)

    def forward(self, x):
        return self.base(x.to(torch.bfloat16)).to(x.dtype)


def test_the_type_of_a_called_layer_is_its_own_affair():
    conv = GRANDConv(D, heads=2)
    conv.field.query, conv.field.key = map(InBfloat16, (conv.field.query, conv.field.key))
    x = torch.randn(N, D)
    assert conv(x, GRAPH).dtype == torch.float32
    with pytest.raises(TypeError, match="`x` must be torch.float32 as the layer is, got .*64"):
        GRANDConv(D)(x.double(), GRAPH)
