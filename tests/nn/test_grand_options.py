"""What GRAND can do before and after the diffusion, each option against its formula."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional

import grand_fast as gf
from grand_fast.nn import GRAND
from grand_fast.testing import assert_close, random_graph

N, C, HIDDEN, CLASSES = 40, 5, 6, 3
ALL = {"mlp": True, "label_channels": CLASSES, "batch_norm": True, "augment": 4, "fc_out": True,
       "encoder_channels": 7, "degree_scaling": True}  # fmt: skip
OPTIONS = {
    "none": {},
    "mlp": {"mlp": True},
    "labels": {"label_channels": CLASSES},
    "batch_norm": {"batch_norm": True},
    "augment": {"augment": 4},
    "fc_out": {"fc_out": True},
    "encoder": {"encoder_channels": 7},
    "degree scaling": {"degree_scaling": True},
    "no decoder": {"decoder": False},
    "no decoder, all else": ALL | {"fc_out": False, "decoder": False},
    "all": ALL,
}
EACH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def hidden_of(options):
    return HIDDEN if options.get("decoder", True) else CLASSES


def build(options, **more):
    given = {"heads": 2, "attention_channels": HIDDEN, "T": 2.0} | options | more
    return GRAND(C, hidden_of(options), CLASSES, **given).double()


def model_of(options, **more):
    model = build(options, **more)
    for parameter in (p for p in model.parameters() if p.dim() < 2):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def inputs(options):
    x = torch.randn(N, C, dtype=torch.float64)
    if "label_channels" not in options:
        return x, None
    labels = functional.one_hot(torch.randint(CLASSES, (N,)), CLASSES).double()
    labels[::3] = 0
    return x, labels


def start_of(model, x, labels):
    """x(0), by hand."""
    h = model.encoder(x)
    if model.hidden is not None:
        h = torch.relu(h) @ model.hidden.weight.T + model.hidden.bias
    if model.mlp is not None:
        for layer in model.mlp.layers:
            h = h + torch.relu(h) @ layer.weight.T + layer.bias
    if labels is not None:
        h = torch.cat([h, labels], dim=1)
    if model.batch_norm is not None:
        mean, variance = h.mean(0), h.var(0, correction=0)
        h = (h - mean) / (variance + 1e-5).sqrt() * model.batch_norm.weight + model.batch_norm.bias
    return torch.cat([h, h.new_zeros(N, model.augment)], dim=1)


def roots(graph):
    """Of the number of edges into each node, `[N, 1]`; 1 where there is none."""
    receivers = graph.edge_index()[1]
    return torch.bincount(receivers, minlength=N).clamp(min=1).double().sqrt()[:, None]


def logits_of(model, h):
    """Those of a state, by hand."""
    if model.decoder is None:
        return h[:, :CLASSES]
    h = torch.relu(h[:, : h.shape[1] - model.augment])
    if model.fc is not None:
        h = torch.relu(h @ model.fc.weight.T + model.fc.bias)
    return h @ model.decoder.weight.T + model.decoder.bias


@EACH
@pytest.mark.parametrize("variant", ["l", "nl", "laplacian"])
def test_against_the_formula(variant, options):
    graph = random_graph("random")
    model = model_of(options, variant=variant, source=True, per_channel=True)
    x, labels = inputs(options)
    if labels is not None:
        labels.requires_grad_()
    x.requires_grad_()
    leaves = [*model.parameters(), *(t for t in (x, labels) if t is not None)]
    logits = model(x, graph, labels)
    got = torch.autograd.grad(logits.square().sum(), leaves)
    h = start_of(model, x, labels)
    assert h.shape[1] == hidden_of(options) + 3 * (labels is not None) + model.augment
    scale = roots(graph) if model.degree_scaling else 1.0
    term = model._term(h / scale, graph)
    h = gf.integrate(term, h / scale, 2.0, method="rk4", step_size=1.0).x * scale
    want_logits = logits_of(model, h)
    want = torch.autograd.grad(want_logits.square().sum(), leaves)
    assert_close("logits", logits, want_logits)
    got, want = (torch.cat([g.flatten() for g in grads]) for grads in (got, want))
    assert_close("gradients", got, want, tolerance=1e-10)


@EACH
def test_every_parameter_is_trained_and_drawn_anew(options):
    model = model_of(options, dropout=0.1, input_dropout=0.1, source=True)
    x, labels = inputs(options)
    model(x, random_graph("random"), labels).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.reset_parameters()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@EACH
def test_state_dict_copy_and_pickle(options):
    graph, (x, labels) = random_graph("random"), inputs(options)
    model = model_of(options)
    model(x, graph, labels)  # batch norm takes note of it
    model.eval()
    want = model(x, graph, labels)
    twin = build(options).eval()
    twin.load_state_dict(model.state_dict())
    for other in (twin, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, graph, labels), want)


def test_plain_weights_keep_their_names():
    """Checkpoints of models without options load whatever options there are."""
    names = set(GRAND(C, HIDDEN, CLASSES, source=True).state_dict())
    ends = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    assert names == ends | {f"field.{name}" for name in (
        "query.weight", "query.bias", "key.weight", "key.bias", "scale.alpha_logit", "scale.beta",
    )}  # fmt: skip


def test_augmented_channels_start_at_zero_and_stay_out_of_the_logits():
    graph, x = random_graph("random"), torch.randn(N, C)
    model = GRAND(C, HIDDEN, CLASSES, augment=2, variant="l", T=1.0)
    h, *_ = model._start(x, graph, None)
    assert h.shape == (N, HIDDEN + 2) and bool((h[:, -2:] == 0).all())
    assert model.field.channels == HIDDEN + 2 and model.decoder.in_features == HIDDEN
    changed = h.clone()
    changed[:, -2:] = 7
    assert torch.equal(model._decode(h, None), model._decode(changed, None))


def test_batch_norm_in_evaluation_uses_what_it_has_seen():
    graph, x = random_graph("random"), torch.randn(N, C)
    model = GRAND(C, HIDDEN, CLASSES, batch_norm=True, T=1.0)
    model.eval()
    untrained = model(x, graph)
    model.train()
    model(x + 3, graph)
    model.eval()
    assert not torch.equal(model(x, graph), untrained)
    half = GRAND(C, HIDDEN, CLASSES, batch_norm=True, T=1.0, variant="laplacian").eval()
    alone = gf.Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), 1)
    # One node, as in no batch: no statistics of it
    assert half(x[:1], alone).isfinite().all()


def test_dropout_of_the_mlp():
    graph, x = random_graph("random"), torch.randn(N, C)
    model = GRAND(C, HIDDEN, CLASSES, mlp=True, dropout=0.5, T=1.0)
    first, *_ = model._start(x, graph, None)
    second, *_ = model._start(x, graph, None)
    assert not torch.equal(first, second) and bool((first == 0).any())
    model.eval()
    assert torch.equal(model(x, graph), model(x, graph))


def test_dropout_within_the_encoder():
    graph, x = random_graph("random"), torch.randn(N, C)
    model = GRAND(C, HIDDEN, CLASSES, encoder_channels=50, dropout=0.5, T=1.0)
    first, *_ = model._start(x, graph, None)
    second, *_ = model._start(x, graph, None)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x, graph), model(x, graph))


def test_degree_scaling_of_equal_attention_is_the_symmetric_laplacian():
    edges = random_graph("random").edge_index()
    both = torch.cat([edges, edges.flip(0)], dim=1).unique(dim=1)
    graph, x = (
        gf.Graph.from_edge_index(both, N, self_loops=1.0),
        torch.randn(N, C, dtype=torch.float64),
    )
    model = build({"degree_scaling": True}, variant="l").eval()
    twin = build({}, variant="laplacian", laplacian="symmetric").eval()
    with torch.no_grad():
        model.field.query.weight.zero_()
        model.field.query.bias.zero_()
    twin.load_state_dict(model.state_dict(), strict=False)
    assert_close("logits", model(x, graph), twin(x, graph))


@pytest.mark.parametrize("variant", ["l", "nl", "laplacian"])
def test_degree_scaling_where_a_node_has_no_edges(variant):
    """It is divided by 1, and decays as it does without: `1 − alpha` an Euler step of length 1."""
    graph, x = random_graph("empty_rows"), torch.randn(N, C, dtype=torch.float64)
    model = model_of({"degree_scaling": True}, variant=variant, method="euler")
    alone = graph.rowptr.diff() == 0
    assert 0 < alone.sum() < N
    alpha = model.field.alpha if variant == "laplacian" else model.field.scale.alpha
    logits = model(x, graph)
    want = model.decoder(torch.relu((1 - alpha) ** 2 * model.encoder(x)))
    assert_close("alone", logits[alone], want[alone])
    h = model.encoder(x) / roots(graph)
    term = model._term(h, graph)
    for _ in range(2):
        h = h + term.vf(0.0, h)
    assert_close("logits", logits, logits_of(model, h * roots(graph)))
    for g in torch.autograd.grad(logits.square().sum(), list(model.parameters())):
        assert g.isfinite().all()


def test_gamma_starts_again_from_0():
    model = build({}, variant="mixed")
    torch.nn.init.constant_(model.gamma, 1.5)
    model.reset_parameters()
    assert model.gamma.item() == 0.0


def test_without_a_decoder_the_state_is_the_prediction():
    graph, x = random_graph("random"), torch.randn(N, C)
    model = GRAND(C, CLASSES, CLASSES, decoder=False, T=0.0)
    assert torch.equal(model(x, graph), model.encoder(x))
    with pytest.raises(ValueError, match=r"`hidden_channels` must be out_channels=3 .* got 6: .*"
                       r"Did you mean encoder_channels=6 or decoder=True\?"):  # fmt: skip
        GRAND(C, HIDDEN, CLASSES, decoder=False)
    with pytest.raises(ValueError, match="`fc_out` must be False with decoder=False"):
        GRAND(C, CLASSES, CLASSES, decoder=False, fc_out=True)
    with pytest.raises(ValueError, match="`encoder_channels` must be at least 1, got 0"):
        GRAND(C, HIDDEN, CLASSES, encoder_channels=0)


def test_constant_initialisation():
    graph, x = random_graph("loops"), torch.randn(N, C)
    model = GRAND(C, HIDDEN, CLASSES, heads=2, constant_init=True)
    for _ in range(2):
        for projection in (model.field.query, model.field.key):
            assert bool((projection.weight == 1e-5).all())
            assert projection.bias.unique().numel() == HIDDEN  # else all channels stay equal
        model.reset_parameters()
    a = model.field.attention(model.encoder(x), graph, mean_heads=True)
    assert_close("a", a, graph.random_walk_weights().double(), tolerance=1e-4)
    model(x, graph).square().sum().backward()
    assert model.field.query.weight.grad.std() > 0
    with pytest.raises(ValueError, match="`constant_init` must be False with score 'gat'"):
        GRAND(C, HIDDEN, CLASSES, constant_init=True, score="gat")


def test_labels_of_any_dtype_and_where_there_are_none():
    graph, (x, labels) = random_graph("random"), inputs({"label_channels": CLASSES})
    model = model_of({"label_channels": CLASSES}).eval()
    want = model(x, graph, labels)
    for given in (labels.bool(), labels.long(), labels.float()):
        assert torch.equal(model(x, graph, given), want)
    unknown = model(x, graph, torch.zeros(N, CLASSES))
    assert not torch.equal(unknown, want) and unknown.isfinite().all()


def test_bad_input():
    graph, x = random_graph("random"), torch.randn(N, C)
    model = GRAND(C, HIDDEN, CLASSES, label_channels=CLASSES, T=1.0)
    cases = [
        (model, None, "`labels` must be given with label_channels=3, got None. Pass one-hot rows"),
        (model, torch.zeros(N), r"\[N, label_channels\] = \[40, 3\], got \[40\]. Did you mean"),
        (model, torch.zeros(N - 1, 3), r"\[N, label_channels\] = \[40, 3\], got \[39, 3\]"),
        (GRAND(C, HIDDEN, CLASSES), torch.zeros(N, 3), "`labels` must be None without"),
    ]
    for each, labels, text in cases:
        for call in (
            each.forward,
            lambda *given, each=each: each.trajectory(*given[:2], 1.0, given[2]),
        ):
            with pytest.raises(ValueError, match=text):
                call(x, graph, labels)
    for name in ("label_channels", "augment"):
        with pytest.raises(ValueError, match=f"GRAND: `{name}` must be at least 0, got -1"):
            GRAND(C, HIDDEN, CLASSES, **{name: -1})
        with pytest.raises(TypeError, match=f"GRAND: `{name}` must be an int, got bool"):
            GRAND(C, HIDDEN, CLASSES, **{name: True})
