"""A solve plans once: an evaluation in it checks nothing again, and computes the same."""

import sys

import pytest
import torch

from grand_fast import Graph, integrate, ops
from grand_fast.nn import GRAND
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.nn.terms import LinearDiffusion
from grand_fast.ops import checks
from grand_fast.solvers.combination import Combination
from grand_fast.testing import assert_close

N, D = 41, 6


def problem(variant="nl", dtype=torch.float64, **options):
    torch.manual_seed(0)
    graph = Graph.from_edge_index(
        torch.randint(N, (2, 300)), N, edge_weight=torch.rand(300, dtype=dtype)
    )
    model = GRAND(D, D, 3, variant=variant, heads=2, T=1.5, step_size=0.5, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, graph, torch.randn(N, D, dtype=dtype, requires_grad=True)


def terms(model, graph, x):
    x0 = x.detach().requires_grad_()
    term = model._term(x0, graph)
    return term, term.planned(x0)


CASES = {
    "nl": {},
    "nl, source": {"source": True},
    "nl, cosine": {"score": "cosine", "normalizer": "squareplus", "reweight": True},
    "nl, exp_kernel": {"score": "exp_kernel", "per_channel": True},
    "nl, gat by sender": {"score": "gat", "normalize": "sender"},
    "nl, fixed alpha": {"alpha": 0.7},
    "l": {"variant": "l", "source": True},
    "laplacian": {"variant": "laplacian", "source": True, "per_channel": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_planned_term_is_the_term(case, backend):
    with ops.backends.backend(backend):
        model, graph, x = problem(**CASES[case])
        found = []
        for term in terms(model, graph, x):
            y = torch.randn(N, D, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
            y.requires_grad_()
            out = term.axpy(0.0, x, Combination([(1.0, x), (-0.5, y), (0.25, x)]), 0.3)
            out = out + term.vf(0.0, x)
            wanted = [x, y, *model.parameters()]
            grads = torch.autograd.grad(
                out.square().sum(), wanted, allow_unused=True, retain_graph=True
            )
            found.append((out, grads))
        (out, grads), (planned_out, planned_grads) = found
        assert torch.equal(planned_out, out)
        for grad, planned_grad in zip(grads, planned_grads, strict=True):
            assert (grad is None) == (planned_grad is None)
            if grad is not None:
                assert_close("gradient", planned_grad, grad)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives(case):
    found = []
    for number in range(2):
        model, graph, x = problem(**CASES[case])
        term = terms(model, graph, x)[number]
        y = term.axpy(0.0, x, Combination([(1.0, x)]), 0.3)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert_close("second derivative", found[1], found[0])


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
@pytest.mark.parametrize("variant", ["nl", "l"])
def test_checks_do_not_grow_with_the_steps(variant, adjoint, monkeypatch):
    counts = []
    for steps in (2, 8):
        model, graph, x = problem(variant, adjoint=adjoint)
        model.step_size = model.T / steps
        seen = []
        real = checks.check_tensor

        def counted(*given, real=real, seen=seen, **named):
            seen.append(given)
            return real(*given, **named)

        for operator in ("projected_attention_diffusion", "csr_diffusion", "attention_diffusion"):
            module = sys.modules[f"grand_fast.ops.{operator}"]
            monkeypatch.setattr(module, "check_tensor", counted)
        model(x, graph).sum().backward()
        counts.append(len(seen))
        monkeypatch.undo()
    assert counts[0] == counts[1] > 0


def test_a_module_with_a_hook_is_called_each_time():
    model, graph, x = problem()
    seen = []
    model.field.register_forward_hook(lambda module, given, result: seen.append(result))
    model(x, graph)
    assert len(seen) == model.stats.nfe
    handle = model.field.query.register_forward_hook(lambda *given: seen.append(None))
    seen.clear()
    model(x, graph)
    assert len(seen) == 2 * model.stats.nfe
    handle.remove()


def test_a_field_of_another_class_is_called_each_time():
    class Doubled(AttentionDiffusion):
        def forward(self, x, graph, x0=None, *, scale=1.0, **options):
            return super().forward(x, graph, x0, scale=2 * scale, **options)

    model, graph, x = problem()
    plain = model(x, graph)
    model.field.__class__ = Doubled
    doubled = model(x, graph)
    model.field.__class__ = AttentionDiffusion
    model.T, model.step_size = 2 * model.T, 2 * model.step_size
    assert not torch.equal(doubled, plain)
    assert_close("twice as fast", model(x, graph), doubled)


def test_autocast_and_transforms_are_not_planned():
    model, graph, x = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x, graph).dtype in (torch.float32, torch.bfloat16)
    model, graph, x = problem()
    out, tangent = torch.func.jvp(
        lambda x: integrate(lambda t, y: model.field(y, graph), x, 1.0).x, (x,), (x,)
    )
    assert tangent.shape == out.shape
    weights = dict(model.named_parameters())
    grads = torch.func.grad(
        lambda weights: torch.func.functional_call(model, weights, (x, graph)).sum()
    )(weights)
    model(x, graph).sum().backward()
    for name, weight in weights.items():
        if weight.grad is not None and name != "field.key.bias":  # which is 0, but for rounding
            assert_close(name, grads[name], weight.grad)


def test_states_that_are_not_contiguous():
    model, graph, x = problem("l")
    wide = torch.randn(N, 2 * D, dtype=torch.float64)
    term, planned = terms(model, graph, wide[:, ::2])
    base = Combination([(1.0, wide[:, ::2]), (0.5, wide.t()[:D].t())])
    got, want = (t.axpy(0.0, wide[:, ::2], base, 0.1) for t in (planned, term))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["nl", "l"])
def test_an_alpha_that_is_a_float_is_rounded_once(variant, dtype):
    model, graph, x = problem(variant, dtype, alpha=0.3)
    term, planned = terms(model, graph, x)
    for tau in (0.7, 0.1, 1 / 3):
        got, want = (t.axpy(0.0, x, Combination([(1.0, x)]), tau) for t in (planned, term))
        assert torch.equal(got, want)


OTHERS = {
    "float64": lambda x: x.double(),
    "fewer nodes": lambda x: x[:10],
    "more channels": lambda x: torch.cat([x, x], 1),
    "a row": lambda x: x[0],
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("place", ["state", "base", "source"])
@pytest.mark.parametrize("variant", ["nl", "l"])
def test_what_is_not_like_the_state_is_checked(variant, place, other):
    """As by a method of a user's own, whose step gives a term whatever it likes."""
    model, graph, x = problem(variant, torch.float32, source=True)
    term, planned = terms(model, graph, x)
    y = OTHERS[other](x)
    if place == "source":
        for t in (term, planned):
            t.source = y.detach()
        y = x
    state, base = (y, x) if place == "state" else (x, y)
    results = []
    for t in (term, planned):
        try:
            results.append(t.axpy(0.0, state, Combination([(1.0, base)]), 0.1))
        except (TypeError, ValueError) as error:
            results.append(str(error))
    unplanned, got = results
    assert torch.equal(got, unplanned) if isinstance(got, torch.Tensor) else got == unplanned
    assert isinstance(got, str) or other == "float64"


@pytest.mark.parametrize("variant", ["nl", "l"])
def test_transforms_within_a_step(variant):
    model, graph, x = problem(variant)
    term, planned = terms(model, graph, x)
    for t in (term, planned):
        t.found = [
            torch.func.jvp(lambda y, t=t: t.vf(0.0, y), (x,), (torch.ones_like(x),))[1],
            torch.func.vmap(lambda y, t=t: t.vf(0.0, y))(torch.stack([x, 2 * x])),
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            t.found.append(t.vf(0.0, x))
    for got, want in zip(planned.found, term.found, strict=True):
        assert torch.equal(got, want)


class Delegate(torch.nn.Module):
    """Another module with something of its own, as adapters are."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *given, **named):
        self.calls += 1
        return self.inner(*given, **named)


def test_what_stands_around_a_field_is_called_each_time():
    model, graph, x = problem()
    want = model(x, graph)
    model.field = Delegate(model.field)
    assert torch.equal(model(x, graph), want)
    assert model.field.calls == model.stats.nfe


def test_a_compiled_field_is_called_each_time():
    model, graph, x = problem()
    seen, call = [], model.field._call_impl

    def compiled(*given, **named):
        seen.append(given)
        return call(*given, **named)

    model.field._compiled_call_impl = compiled  # as `model.field.compile()` sets it
    model(x, graph)
    assert len(seen) == model.stats.nfe


@pytest.mark.parametrize("alpha", ["0.5", True, 10**400, None])
def test_an_alpha_that_is_no_number_is_refused_when_planned(alpha):
    graph, x = problem()[1:]
    term = LinearDiffusion(torch.rand(300).double(), graph, alpha=alpha, beta=None, x0=None)
    with pytest.raises((TypeError, ValueError), match="csr_diffusion: `alpha` must"):
        term.planned(x)
