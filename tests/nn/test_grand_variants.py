"""GRAND's variants that choose their matrix or their edges, against dense and rebuilt ones."""

import numpy as np
import pytest
import torch

import grand_fast as gf
from grand_fast.nn import GRAND
from grand_fast.testing import assert_close, random_edge_index, random_graph

from ._dense import dense_attention, dense_random_walk, weighted_graph


def euler(model, a, h, steps):
    """Dense explicit Euler with constant `A [N, N]`."""
    h0, scale = h, model.field.scale
    for _ in range(steps):
        f = scale.alpha * (a @ h - h)
        h = h + (f if scale.beta is None else f + scale.beta * h0)
    return h


MIXED = {
    "paper": {},
    "source": {"source": True, "heads": 1},
    "cosine": {"score": "cosine", "normalizer": "squareplus", "normalize": "sender"},
    "per_channel": {"per_channel": True, "source": True, "reweight": True},
}


@pytest.mark.parametrize("kind", ["repeated", "empty_rows"])
@pytest.mark.parametrize("options", MIXED.values(), ids=MIXED)
def test_mixed_against_dense(backend, options, kind):
    graph, weight = weighted_graph(kind)
    n = graph.num_nodes
    model = GRAND(3, 4, 2, variant="mixed", T=2.0, method="euler", **{"heads": 2} | options)
    model = model.double()
    for parameter in (p for p in model.parameters() if p.dim() < 2):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(n, 3, dtype=torch.float64)
    leaves = list(model.parameters())
    with gf.backend(backend):
        logits = model(x, graph)
        got = torch.autograd.grad(logits.square().sum(), leaves)
    h = model.encoder(x)
    attention = dense_attention(model.field, h, graph, weight if model.field.reweight else None)
    share = torch.sigmoid(model.gamma)
    a = (1 - share) * attention.mean(0) + share * dense_random_walk(graph, weight)
    want_logits = model.decoder(torch.relu(euler(model, a, h, 2)))
    want = torch.autograd.grad(want_logits.square().sum(), leaves)
    assert_close("logits", logits, want_logits)
    names = [name for name, _ in model.named_parameters()]
    assert_close("gamma", got[names.index("gamma")], want[names.index("gamma")], tolerance=1e-11)
    # Together: a bias that cancels in the softmax has a gradient of rounding errors alone
    got, want = (torch.cat([g.flatten() for g in grads]) for grads in (got, want))
    assert_close("gradients", got, want, tolerance=1e-11)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_mixed_lies_between_attention_and_laplacian(share):
    graph, x = random_graph("loops"), torch.randn(40, 3)
    mixed = GRAND(3, 4, 2, variant="mixed", T=3.0)
    with torch.no_grad():
        mixed.gamma.fill_(200.0 if share else -200.0)
    end = GRAND(3, 4, 2, variant="laplacian" if share else "l", T=3.0)
    weights = mixed.state_dict()
    names = {"field.alpha_logit": "field.scale.alpha_logit"}
    end.load_state_dict({name: weights[names.get(name, name)] for name in end.state_dict()})
    assert_close("logits", mixed(x, graph), end(x, graph).double())


@pytest.mark.parametrize("solve", [
    {"method": "uniformisation", "step_size": None},
    {"method": gf.solvers.SemiImplicitEuler(tol=1e-12), "step_size": 0.01},
    {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "adjoint": "continuous"},
], ids=["uniformisation", "semi_implicit_euler", "continuous"])  # fmt: skip
def test_mixed_by_every_kind_of_solver(solve):
    graph, x = random_graph("loops", 12), torch.randn(12, 3, dtype=torch.float64)
    exact = GRAND(3, 4, 2, variant="mixed", T=2.0, step_size=0.05).double()
    model = GRAND(3, 4, 2, variant="mixed", T=2.0, **solve).double()
    model.load_state_dict(exact.state_dict())
    results = []
    for each in (model, exact):
        logits = each(x, graph)
        grads = torch.autograd.grad(logits.square().sum(), list(each.parameters()))
        results.append((logits, torch.cat([g.flatten() for g in grads])))
    order_1 = "semi" in type(model.method).__name__.lower()
    for name, got, want in zip(("logits", "gradients"), *results, strict=True):
        assert_close(name, got, want, tolerance=2e-2 if order_1 else 1e-6)


RULES = {
    "threshold": {"attention_threshold": 0.18},
    "quantile": {"attention_quantile": 0.4},
}


def kept_by(rule, a):
    """The edges that stay, from their mean attention."""
    if "attention_threshold" in rule:
        return a > rule["attention_threshold"]
    return a > float(np.quantile(a.detach().numpy(), rule["attention_quantile"]))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", [
    {"variant": "nl-rw"},
    {"variant": "nl-rw", "score": "pearson", "normalizer": "squareplus", "normalize": "sender"},
    {"variant": "nl-rw", "reweight": True, "source": True},
    {"variant": "l"},
    {"variant": "l", "mix_features": True},
], ids=["nl", "nl-pearson", "nl-weights", "l", "l-mix"])  # fmt: skip
def test_thinned_is_the_plain_variant_on_the_kept_edges(backend, rule, options):
    edges, n = random_edge_index("random")
    weight = 0.5 + torch.rand(edges.shape[1], dtype=torch.float64)
    graph = gf.Graph.from_edge_index(edges, n, weight)
    options = {"heads": 2, "T": 2.0} | options
    model = GRAND(3, 4, 2, **options, **rule).double()
    torch.nn.init.normal_(model.field.query.weight)
    plain = GRAND(3, 4, 2, **options | {"variant": options["variant"][:2].strip("-")}).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(n, 3, dtype=torch.float64)
    with gf.backend(backend):
        a = model.field.attention(model.encoder(x), graph, mean_heads=True)
        mask = kept_by(rule, a)
        assert 0.2 < float(mask.double().mean()) < 0.9
        fewer = gf.Graph.from_edge_index(edges[:, mask], n, weight[mask])
        results = []
        for each, on in ((model, graph), (plain, fewer)):
            logits = each(x, on)
            grads = torch.autograd.grad(logits.square().sum(), list(each.parameters()))
            results.append([logits, *grads])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        evaluated = model.eval()(x, graph)
        on = fewer if "attention_threshold" in rule else graph
        assert torch.equal(evaluated, plain.eval()(x, on))


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint", "continuous"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("variant", ["l", "nl-rw"])
def test_attention_is_trained_on_the_edges_that_stay(variant, rule, adjoint):
    graph, x = random_graph("loops"), torch.randn(40, 3)
    model = GRAND(3, 4, 2, variant=variant, heads=2, T=2.0, adjoint=adjoint, **rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(x, graph).square().mean().backward()
    optimizer.step()
    for name in ("field.query.weight", "field.query.bias", "field.key.weight"):
        moved = (model.get_parameter(name) - before[name]).abs().max()
        assert float(moved) > 1e-5, name


def test_quantiles_count_edges_as_numpy_does():
    """Any share, ties included; none of them keeps an edge at the quantile itself."""
    from grand_fast.nn._thinning import thinned

    class Field:
        def attention(self, x, graph, *, mean_heads):
            return x

    for e in (1, 2, 5, 200):
        a = torch.rand(e, dtype=torch.float64)
        for values in (a, (4 * a).floor(), torch.ones_like(a)):
            graph = gf.Graph.from_edge_index(torch.zeros(2, e, dtype=torch.int64))
            for q in (0.0, 0.1, 1 / 3, 0.5, 0.75, 0.99):
                kept = thinned(Field(), values, graph, quantile=q).num_edges
                assert kept == int((values.numpy() > np.quantile(values.numpy(), q)).sum())


def test_no_edge_left_and_none_to_begin_with():
    x = torch.randn(40, 3)
    model = GRAND(3, 4, 2, variant="nl-rw", attention_threshold=0.99, T=1.0, alpha=1.0,
                  method="euler")  # fmt: skip
    path = gf.Graph.from_edge_index(torch.arange(40).repeat(2, 2), 40)  # two loops each
    # Each loop has a half of the attention: all go, and x decays to 0
    assert_close("decay", model(x, path), model.decoder.bias.expand(40, 2).double())
    for rule in RULES.values():
        model = GRAND(3, 4, 2, variant="nl-rw", **rule)
        assert model(x, random_graph("no_edges")).isfinite().all()


def test_without_a_rule_nl_rw_is_nl():
    graph, x = random_graph("random"), torch.randn(40, 3)
    model, plain = (GRAND(3, 4, 2, variant=variant) for variant in ("nl-rw", "nl"))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x, graph), plain(x, graph))


def test_bad_choices():
    cases = [
        ({"variant": "nl", "attention_threshold": 0.1}, ValueError, "variant l or nl-rw, got 'nl'"),
        ({"variant": "nl", "attention_quantile": 0.1}, ValueError, "Did you mean 'nl-rw'"),
        ({"variant": "laplacian", "attention_threshold": 0.1}, ValueError, "got 'laplacian'"),
        ({"variant": "nl-rw", "attention_threshold": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ({"variant": "nl-rw", "attention_quantile": -0.1}, ValueError, r"in \[0, 1\), got -0.1"),
        ({"variant": "nl-rw", "attention_quantile": "half"}, TypeError, "a float, got str"),
        ({"variant": "nl-rw", "attention_quantile": 0.1, "attention_threshold": 0.1}, ValueError,
         "Give one of them"),
        ({"variant": "mixed", "mix_features": True}, ValueError, "`mix_features` must be False"),
    ]  # fmt: skip
    for options, error, text in cases:
        with pytest.raises(error, match=text) as caught:
            GRAND(3, 4, 2, **options)
        assert str(caught.value).startswith("GRAND: `")
