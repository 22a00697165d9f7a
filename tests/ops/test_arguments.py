"""What operators take for `alpha`, `beta` and the values of edges, and what they refuse."""

import re

import pytest
import torch

from grand_fast.ops import (
    attention_diffusion,
    csr_diffusion,
    edge_attention,
    projected_attention_diffusion,
)
from grand_fast.testing import TOLERANCE, assert_close, random_graph
from tests.ops._problems import normal

GRAPH = random_graph("hub", 12)
N, D, E = GRAPH.num_nodes, 4, GRAPH.num_edges


def given_weights(*, x, a, **options):
    return csr_diffusion(x, a, GRAPH, **options)


def attention(*, x, q, k, **options):
    return attention_diffusion(x, q, k, GRAPH, **options)


def projected(*, x, weight, bias, **options):
    return projected_attention_diffusion(x, weight, bias, GRAPH, heads=2, **options)


def edges(*, q, k, **options):
    return edge_attention(q, k, GRAPH, **options)


NODES = {
    given_weights: {"x": (N, D)},
    attention: {"x": (N, D), "q": (N, 2, 3), "k": (N, 2, 3)},
    projected: {"x": (N, D), "weight": (12, D), "bias": (12,)},
    edges: {"q": (N, 2, 3), "k": (N, 2, 3)},
}
fields = pytest.mark.parametrize("call", [given_weights, attention, projected])
operators = pytest.mark.parametrize("call", NODES)


def nodes(call, dtype=torch.float64):
    shapes = NODES[call].items()
    return {name: normal(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes)}


def weights(call, dtype=torch.float64):
    """The operator's values of edges."""
    name = "a" if call is given_weights else "edge_weight"
    return {name: 0.5 + normal(E, seed=9).abs().to(dtype)}


@fields
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (D,), (1, 1), (1, D)], ids=str)
def test_scales_broadcast_as_in_torch(call, shape, dtype, backend):
    given = nodes(call) | weights(call)
    found = []
    for name in (backend, "formula"):
        leaves = {n: t.clone().requires_grad_() for n, t in given.items()}
        alpha, beta = (normal(*shape, seed=s).to(dtype).requires_grad_() for s in (20, 21))
        x0 = normal(N, D, seed=22).requires_grad_()
        if name == "formula":  # with the scales as torch broadcasts them
            f = alpha * call(**leaves, backend="reference") + beta * x0
        else:
            f = call(**leaves, alpha=alpha, beta=beta, x0=x0, backend=name)
        inputs = [*leaves.values(), alpha, beta, x0]
        found.append([f, *torch.autograd.grad(f, inputs, normal(N, D, seed=23))])
        assert found[-1][-2].shape == found[-1][-3].shape == shape
        assert found[-1][-2].dtype == found[-1][-3].dtype == dtype
    for got, want in zip(*found, strict=True):
        assert_close("f or a gradient", got, want.double())


@fields
@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("shape", [(N, 1), (N, D), (D, 1), (2,), (D + 1,), (1, 2), (1, 1, D)],
                         ids=str)  # fmt: skip
def test_scales_by_node_or_of_another_size_are_refused(call, name, shape):
    scales = {"alpha": 1.0, "beta": 1.0, "x0": torch.ones(N, D, dtype=torch.float64)}
    text = (
        rf"`{name}` must be a scalar, \[d\] = \[4\] or \[1, d\], .* got {re.escape(str([*shape]))}"
    )
    with pytest.raises(ValueError, match=text):
        call(**nodes(call), **weights(call), **scales | {name: torch.rand(shape)})


@operators
def test_complex_numbers_are_refused_whole(call):
    given = nodes(call) | weights(call)
    for name, t in given.items():
        text = f"`{name}` must be floating, got torch.complex128. Pass its .real and .imag"
        with pytest.raises(TypeError, match=text):
            call(**given | {name: t + 0j})
    if call is not edges:
        scales = {"alpha": 1.0, "beta": 1.0, "x0": torch.ones(N, D, dtype=torch.float64)}
        for name in ("alpha", "beta", "x0"):
            with pytest.raises(TypeError, match=f"`{name}` must be floating, got torch.complex64"):
                call(**given, **scales | {name: torch.ones(D, dtype=torch.complex64)})


@operators
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
def test_counts_and_truths_are_refused_with_a_remedy(call, dtype):
    given = nodes(call) | weights(call)
    for name, t in given.items():
        text = rf"`{name}` must be floating, got {dtype}. Try .float\(\)"
        with pytest.raises(TypeError, match=text):
            call(**given | {name: t.to(dtype)})


TYPES = [
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),  # neither holds the other: float32
]


def results(call, given, *, dtype=None, backend):
    """The result and every gradient, of inputs brought to `dtype` by hand if that is given."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    own = {n: t if dtype is None else t.to(dtype) for n, t in leaves.items()}
    extra = {}
    if call is not edges:
        x = own["x"]
        extra = {
            "alpha": own["alpha"],
            "beta": 0.5,
            "x0": own["x0"],
            "add": [(2.0, x), (0.5, own["y"])],
        }
        own = {n: t for n, t in own.items() if n not in ("alpha", "x0", "y")}
    out = call(**own, **extra, backend=backend)
    upstream = normal(*out.shape, seed=30).to(out.dtype)
    return out, dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream), strict=True)
    )


@operators
@pytest.mark.parametrize(("of_nodes", "of_edges"), TYPES, ids=str)
def test_values_of_edges_in_another_type_are_promoted(call, of_nodes, of_edges, backend):
    given = nodes(call, of_nodes) | weights(call, of_edges)
    if call is not edges:
        given |= {n: normal(N, D, seed=40).to(of_nodes) for n in ("x0", "y")}
        given["alpha"] = normal(D, seed=41).float()  # its type has no say
    wide = torch.promote_types(of_nodes, of_edges)
    out, grads = results(call, given, backend=backend)
    want, of_wide = results(call, given, dtype=wide, backend=backend)
    exact, of_exact = results(call, given, dtype=torch.float64, backend="reference")
    assert out.dtype == wide and torch.equal(out, want)
    assert_close("result", out, exact)
    for name, grad in grads.items():
        assert grad.dtype == given[name].dtype and torch.equal(grad, of_wide[name])
        # Those by the bias are sums over nodes that nearly cancel
        assert_close(name, grad, of_exact[name].double(), tolerance=4 * TOLERANCE[grad.dtype])


@operators
def test_values_of_edges_given_by_position_or_name(call):
    given = nodes(call) | weights(call, torch.float32)
    want = call(**{name: t.double() for name, t in given.items()})
    assert torch.equal(call(**given), want)
    if call is given_weights:
        assert torch.equal(csr_diffusion(a=given["a"], x=given["x"], graph=GRAPH), want)


@operators
def test_nodes_that_differ_among_themselves_are_refused(call):
    given = nodes(call)
    for name in list(given)[1:]:
        for of_edges in (torch.float64, torch.float32):
            mixed = given | weights(call, of_edges) | {name: given[name].bfloat16()}
            with pytest.raises(TypeError, match=f"`{name}` must be torch.float64, got torch.bf"):
                call(**mixed)


@operators
def test_under_autocast_values_of_edges_may_be_of_any_type(call):
    given = nodes(call) | weights(call, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(**given), call(**{n: t.double() for n, t in given.items()}))
        low = nodes(call, torch.bfloat16) | weights(call, torch.float32)
        assert call(**low).dtype == torch.float32


@pytest.mark.parametrize("call", [given_weights, attention])
def test_promotion_in_a_compiled_program(call):
    torch._dynamo.reset()
    given = nodes(call, torch.float32) | weights(call, torch.float64)
    leaves = {n: t.requires_grad_() for n, t in given.items()}
    want, got = call(**leaves), torch.compile(call, fullgraph=True, backend="aot_eager")(**leaves)
    assert got.dtype == torch.float64
    assert_close("result", got, want)
    grads = [torch.autograd.grad(out.sum(), list(leaves.values())) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype
        assert_close("gradient", a, b.double())


@fields
@pytest.mark.parametrize("shape", [(3, N, D), (N,), (N, D, 1), (N + 1, D), (N, 0), ()], ids=str)
def test_a_state_of_another_shape_is_told_its_own(call, shape):
    given = nodes(call) | weights(call) | {"x": torch.ones(shape, dtype=torch.float64)}
    got = re.escape(str([*shape]))
    with pytest.raises(ValueError, match=rf"`x` must have shape \[N, d\] = \[12, ≥1\], got {got}"):
        call(**given)
