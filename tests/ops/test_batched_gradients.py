"""Batches of gradients, forward mode: one after another by the kernels, or by the reference."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

import grand_fast as gf
from grand_fast import ops
from grand_fast.kernels.stage_update import cpu
from grand_fast.ops.backends import batch_level, outside_transforms
from grand_fast.ops.step_updates import StepUpdates
from grand_fast.testing import assert_close, random_graph

from ._calls import CALLS, tensors

N = 7
GRAPH = random_graph("empty_rows", N)
SQUAREPLUS = {
    "squareplus": lambda graph, x, q, k, **_: ops.attention_diffusion(
        x, q, k, graph, normalizer="squareplus", normalize="sender"
    ),
    "squareplus edges": lambda graph, q, k, a, **_: ops.edge_attention(
        q, k, graph, score="exp_kernel", normalizer="squareplus", edge_weight=a, mean_heads=True
    ),
    "cosine": lambda graph, x, weight, bias, **_: ops.projected_attention_diffusion(
        x, weight, bias, graph, heads=2, score="cosine", normalizer="squareplus"
    ),
}
ALL = CALLS | SQUAREPLUS


@pytest.fixture(autouse=True)
def _kernels_for_small_tensors(monkeypatch):
    """Which are else combined by torch, whose operations batches pass through."""
    monkeypatch.setattr(cpu, "_LARGE_BYTES", 0)


def small():
    return tensors(GRAPH, torch.float64, d=3)


def stacked(rows):
    return [None if of[0] is None else torch.stack(of) for of in zip(*rows, strict=True)]


def compare(got, want):
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert_close("gradient", g, w, tolerance=1e-11)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_batches(backend, name, create_graph):
    t = small()
    with gf.backend(backend):
        y = ALL[name](GRAPH, **t)
        pull = partial(torch.autograd.grad, y, list(t.values()), retain_graph=True,
                       create_graph=create_graph, allow_unused=True)  # fmt: skip
        v = torch.randn(4, *y.shape, dtype=torch.float64)
        want = stacked([pull(each) for each in v])
        compare(pull(v, is_grads_batched=True), want)
        used = [t[n] for n, g in zip(t, want, strict=True) if g is not None]
        pull = partial(torch.autograd.grad, y, used, retain_graph=True)
        compare(torch.func.vmap(pull)(v), [g for g in want if g is not None])
    assert batch_level() == 0


@pytest.mark.parametrize("name", ALL)
def test_the_kernels_compute_them(name, monkeypatch):
    """Not the reference."""
    t = small()
    y = ALL[name](GRAPH, **t)
    monkeypatch.setattr(ops._autograd.Operator, "differentiate", None)
    v = torch.randn(2, *y.shape, dtype=torch.float64)
    torch.autograd.grad(y, list(t.values()), v, is_grads_batched=True, allow_unused=True)


@pytest.mark.parametrize("name", ALL)
def test_batches_through_more_than_one_operator(name):
    """The gradients that come to the first are not contiguous."""
    t = small()

    def run(x):
        y = ALL[name](GRAPH, **{**t, "x": x})
        return ops.csr_diffusion((x.t() * y.square().mean()).t(), t["a"], GRAPH)

    want = jacobian(run, t["x"].detach())
    assert_close("jacobian", jacobian(run, t["x"].detach(), vectorize=True), want, tolerance=1e-11)


@pytest.mark.parametrize("name", ALL)
def test_forward_mode(name):
    t = small()
    tangents = {n: torch.randn_like(v) for n, v in t.items()}

    def run(*given):
        return ALL[name](GRAPH, **dict(zip(t, given, strict=True)))

    _, want = torch.autograd.functional.jvp(run, tuple(t.values()), tuple(tangents.values()))
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(t[n].detach(), tangents[n]) for n in t]
        got = forward_ad.unpack_dual(run(*dual)).tangent
    assert_close("tangent", got, want, tolerance=1e-10)
    assert_close("after", run(*t.values()), run(*(v.detach() for v in t.values())))


def test_the_combinations_of_a_step():
    x, f = torch.randn(2, N, 3, dtype=torch.float64).requires_grad_().unbind(0)

    def run(x, f):
        update = StepUpdates()
        a = update([(1.0, x), (0.5, f)])
        b = update([(1.0, x), (0.25, f), (-1.5, a.sin())])
        return update([(2.0, x), (1.0, b), (0.1, f)])

    y = run(x, f)
    v = torch.randn(3, N, 3, dtype=torch.float64)
    want = stacked([torch.autograd.grad(y, (x, f), each, retain_graph=True) for each in v])
    compare(torch.autograd.grad(y, (x, f), v, is_grads_batched=True, retain_graph=True), want)
    # And one at a time again: nothing is left of the batch
    compare(torch.autograd.grad(y, (x, f), v[0]), [g[0] for g in want])


def test_a_step_outside_of_what_is_mapped():
    """Both kinds of map go on afterwards, errors or not."""
    seen = []

    def run(t):
        with pytest.raises(ZeroDivisionError), outside_transforms():
            seen.append(torch._C._are_functorch_transforms_active())
            raise ZeroDivisionError
        return 2 * t

    rows = torch.randn(3, 2)
    assert torch.equal(torch.func.vmap(run)(rows), 2 * rows)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            level = batch_level()
            with outside_transforms():
                seen.append(batch_level() > 0)
                torch.rand(2)  # which a map does not allow
            assert batch_level() == level == 1
            return 2 * dy

    x = torch.randn(2, requires_grad=True)
    (dx,) = torch.autograd.grad(Twice.apply(x), x, rows, is_grads_batched=True)
    assert torch.equal(dx, 2 * rows) and seen == [False, False]
