"""Second derivatives, which go through the reference, and `torch.func`."""

import pytest
import torch

from grand_fast import ops
from grand_fast.testing import assert_close, random_graph

from ._calls import CALLS, gradients, tensors
from ._problems import normal

GRAPH = random_graph("empty_rows", 8)
N, E = GRAPH.num_nodes, GRAPH.num_edges


def small():
    return tensors(GRAPH, torch.float64, d=2)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name):
    t = {n: v for n, v in small().items() if n in CALLS[name].__code__.co_varnames}

    def call(*values):
        return CALLS[name](GRAPH, **dict(zip(t, values, strict=True)))

    assert torch.autograd.gradgradcheck(call, tuple(t.values()), fast_mode=True)


COMBINATIONS = [
    ("scaled_dot", "squareplus", "receiver"),
    ("cosine", "softmax", "sender"),
    ("exp_kernel", "squareplus", "sender"),
    ("gat", "softmax", "receiver"),
]


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("op", ["attention_diffusion", "edge_attention"])
def test_second_derivatives_of_the_family(op, combination, backend):
    score, normalizer, normalize = combination
    d_k = 1 if score == "gat" else 3
    x, q, k = normal(N, 2, seed=1), normal(N, 2, d_k, seed=2), normal(N, 2, d_k, seed=3)
    w = 1 + normal(E, seed=4).abs()
    options = {"score": score, "normalizer": normalizer, "normalize": normalize}

    def call(x, q, k, w):
        given = {**options, "edge_weight": w, "backend": backend}
        if op == "edge_attention":
            return ops.edge_attention(q, k, GRAPH, **given)
        return ops.attention_diffusion(x, q, k, GRAPH, **given, alpha=0.5, add=[(0.5, x)])

    leaves = [t.requires_grad_() for t in (x, q, k, w)]
    if op == "edge_attention":
        assert torch.autograd.gradgradcheck(
            lambda q, k, w: call(x, q, k, w), leaves[1:], fast_mode=True
        )
    else:
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_inputs_that_depend_on_one_another():
    """Each gradient is by that input alone, though q and k are made of x."""
    x = small()["x"]

    def call(x):
        q = x.view(N, 2, 1)
        return ops.attention_diffusion(x, q, 2 * q, GRAPH, backend="cpu")

    assert torch.autograd.gradgradcheck(call, (x,), fast_mode=True)
    once = torch.autograd.grad(call(x).square().sum(), x)[0]
    again = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)[0]
    assert_close("dx", again, once)


def test_a_gradient_penalty_trains():
    t = small()
    f = CALLS["projected_attention_diffusion"](GRAPH, **t)
    (dx,) = torch.autograd.grad(f.sum(), t["x"], create_graph=True)
    dx.square().sum().backward()
    assert t["weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", CALLS)
def test_torch_func_grad(name):
    t = small()
    want = gradients(CALLS[name](GRAPH, **t), t.values())
    plain = {n: v.detach() for n, v in t.items()}
    got = torch.func.grad(lambda t: CALLS[name](GRAPH, **t).square().sum())(plain)
    for n, g in zip(t, want, strict=True):
        assert_close(n, got[n], torch.zeros_like(t[n]) if g is None else g)


@pytest.mark.parametrize("name", CALLS)
def test_torch_func_vmap_and_jvp(name):
    t = {n: v.detach() for n, v in small().items()}
    rows = torch.stack([t["x"], 2 * t["x"], t["x0"]])
    got = torch.func.vmap(lambda x: CALLS[name](GRAPH, **{**t, "x": x}))(rows)
    for i, x in enumerate(rows):
        assert_close("row", got[i], CALLS[name](GRAPH, **{**t, "x": x}))

    def of(x):
        return CALLS[name](GRAPH, **{**t, "x": x, "q": x.repeat(1, 3).view(N, 2, 3)})

    _, tangent = torch.func.jvp(of, (t["x"],), (t["x0"],))
    step = 1e-6
    slope = (of(t["x"] + step * t["x0"]) - of(t["x"] - step * t["x0"])) / (2 * step)
    assert_close("tangent", tangent, slope, tolerance=1e-7)  # of the differences
