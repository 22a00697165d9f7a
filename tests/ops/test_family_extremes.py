"""The family where formulas are delicate: ties, no edges, weights of 0, large scores."""

import pytest
import torch

import grand_fast as gf
from grand_fast.ops import edge_attention
from grand_fast.testing import TOLERANCE, assert_close
from tests.conftest import BACKENDS
from tests.ops import _dense
from tests.ops._family import (
    PARAMETERS,
    Member,
    attention,
    compare_attention,
    compare_diffusion,
    dense_attention,
    dense_diffusion,
    diffusion,
    edges_of,
    members,
    problem,
    without_state,
)
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")

DTYPES = [torch.float32, torch.float64]


def is_squareplus_of_dots(member):
    return member.normalizer == "squareplus" and member.score == "scaled_dot"


@members(kind=["no_edges", "empty", "single", "path"], backend=BACKENDS)
def test_hardly_any_edges(member, kind, backend):
    edges, n = edges_of(kind)
    for dtype in DTYPES:
        compare_diffusion(member, edges, n, problem(member, edges, n), backend, dtype)
    inputs = without_state(problem(member, edges, n))
    a = attention(member, gf.Graph.from_edge_index(edges, n))(backend, **inputs)
    assert_close("a", a, dense_attention(member, edges)(**inputs))


@members(
    where=is_squareplus_of_dots,
    dtype=DTYPES,
    tie=["edges", "heads", "rows", "repeated"],
    backend=BACKENDS,
)
def test_the_gradient_of_the_largest_score_is_shared_by_ties(tie, member, dtype, backend):
    """As `Tensor.max` shares it; the scores here are exact in any order of sums."""
    edges = torch.tensor([[1, 2, 3, 0, 2, 0], [0, 0, 0, 1, 1, 3]])
    q = torch.zeros(4, 2, 1)
    k = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 1.0], [0.5, 1.0]])[..., None]
    w = torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, -1.0])
    q[0] = torch.tensor([[2.0], [1.0]])  # scores of node 0: 8, 8, 1 and, of head 1, 4, 2, 1
    if tie == "heads":
        q[0, 1] = 2.0
        w[1] = 1.0  # 8, 4, 1 and 8, 2, 2
    elif tie == "rows":
        q[1, 0], w[1], w[3] = 4.0, 1.0, 0.25  # 8, 4, 1 of node 0; 3, 8 of node 1
    elif tie == "repeated":
        edges = torch.cat([edges, edges[:, :1]], 1)
        w = torch.cat([w, w[:1]])
    inputs = {"q": q.double(), "k": k.double(), "edge_weight": w.double()}
    s = _dense.node_scores(q, k, "scaled_dot")[edges[1], edges[0]] * w[:, None]
    assert (s == s.max()).sum() == {"edges": 2, "heads": 2, "rows": 2, "repeated": 3}[tie]
    compare_attention(member, edges, 4, inputs, backend, dtype)


@members(where=is_squareplus_of_dots, backend=BACKENDS)
def test_one_tie_by_hand(member, backend):
    """One group has an edge of the largest score, the other one of it and one below."""
    edges = torch.tensor([[0, 1, 2], [0, 1, 1]])
    if member.normalize == "sender":
        edges = edges.flip(0)
    w = torch.tensor([2.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    one = torch.ones(3, 1, 1, dtype=torch.float64)
    options = member._asdict()
    graph = gf.Graph.from_edge_index(edges, 3)
    a = edge_attention(one, one, graph, edge_weight=w, backend=backend, **options)[:, 0]
    p = (-3 + 13**0.5) / 2  # of the third, with v = −3
    assert_close("a", a, torch.tensor([1.0, 1 / (1 + p), p / (1 + p)], dtype=a.dtype))
    (dw,) = torch.autograd.grad(a[2], w)
    # dp/dv = p / √(v² + 4); the second edge has v = 0, p = 1, dp/dv = ½
    own, other = p / 13**0.5 / (1 + p) ** 2, -p / 2 / (1 + p) ** 2
    top = -(own + other)
    assert_close("dw", dw, torch.tensor([top / 2, other + top / 2, own], dtype=a.dtype))


@members(dtype=DTYPES, kind=["hub", "repeated"], backend=BACKENDS)
def test_all_scores_equal(member, kind, dtype, backend):
    edges, n = edges_of(kind)
    inputs = problem(member, edges, n, weights=False)
    for name, value in (("q", 0.5), ("k", 0.25)):
        d_k = inputs[name].shape[2]
        pattern = torch.tensor([1.0, -1.0, 2.0, 1.0])[:d_k]  # exact sums
        inputs[name] = (value * pattern).double().expand(n, 3, d_k).clone()
    group = edges[1] if member.normalize == "receiver" else edges[0]
    degree = group.bincount(minlength=n)[group].double()
    a = attention(member, gf.Graph.from_edge_index(edges, n))(
        backend, **{name: t.to(dtype) for name, t in without_state(inputs).items()}
    )
    assert_close("a", a, (1 / degree)[:, None].expand_as(a))
    compare_diffusion(member, edges, n, inputs, backend, dtype)


@members(dtype=DTYPES, value=[0.0, -50.0], backend=BACKENDS)
def test_weights_that_are_zero_or_negative(member, value, dtype, backend):
    edges, n = edges_of("random")
    inputs = problem(member, edges, n)
    inputs["edge_weight"][::2] = value
    # Scores of hundreds keep their digits behind the point less well.
    compare_diffusion(
        member, edges, n, inputs, backend, dtype, 1e-4 if dtype == torch.float32 else 1e-11
    )


@members(backend=BACKENDS)
def test_all_weights_zero(member, backend):
    """Then all scores are 0; for squareplus all tie."""
    edges, n = edges_of("random")
    inputs = problem(member, edges, n)
    inputs["edge_weight"] *= 0
    for dtype in DTYPES:
        compare_diffusion(member, edges, n, inputs, backend, dtype)


@members(3, dtype=DTYPES, backend=BACKENDS)
def test_large_scores(member, dtype, backend):
    """±1000 and more: nothing overflows, and squareplus keeps its digits."""
    edges, n = edges_of("hub")
    inputs = problem(member, edges, n)
    inputs = {name: t for name, t in inputs.items() if name not in PARAMETERS}
    if member.score in ("scaled_dot", "gat"):
        for name in ("q", "k"):
            inputs[name] = inputs[name] * (20 if member.score == "scaled_dot" else 300)
    else:
        inputs["edge_weight"] = inputs["edge_weight"] * 1000
    s = _dense.node_scores(inputs["q"], inputs["k"], member.score)[edges[1], edges[0]]
    s = s * inputs["edge_weight"][:, None]
    assert s.max() > 1000 and s.min() < -1000
    graph = gf.Graph.from_edge_index(edges, n)
    # Scores of thousands carry a rounding of 3e-4 in float32, and a softmax inherits it; the
    # formula of squareplus as it stands loses half its digits, so float64 is compared to less.
    tolerance = 1e-2 if dtype == torch.float32 else 1e-8
    for call, formula, given in (
        (diffusion(member, graph), dense_diffusion(member, edges), inputs),
        (attention(member, graph), dense_attention(member, edges), without_state(inputs)),
    ):
        if member.normalizer == "squareplus":
            compare(
                call,
                given,
                backend=backend,
                dtype=dtype,
                tolerance=tolerance,
                specification=formula,
            )
            continue
        # A softmax has one winner: gradients by scores are a difference of 1 and what rounds to 1.
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items()}
        out = call(backend, **leaves)
        want = formula(**{name: t.detach().double() for name, t in leaves.items()})
        assert_close("output", out, want, tolerance=tolerance)
        for name, grad in zip(
            leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True
        ):
            assert torch.isfinite(grad).all(), name


@pytest.mark.parametrize("normalize", ["receiver", "sender"])
def test_squareplus_of_far_scores_in_float32(normalize, backend):
    """(v + √(v² + 4)) / 2 is −1/v there; as it stands it is 0 in float32 from v = −4096 on."""
    member = Member("scaled_dot", "squareplus", normalize)
    q = torch.ones(4, 1, 1)
    k = torch.tensor([0.0, -3e4, -4e4, -6e4])[:, None, None]
    edges = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1]])
    if normalize == "sender":
        q, k, edges = k, q, edges.flip(0)
    a = attention(member, gf.Graph.from_edge_index(edges, 4))(backend, q=q, k=k)[:, 0]
    p = torch.tensor([1 / 3, 1 / 4, 1 / 6], dtype=torch.float64)
    assert_close("a", a, torch.cat([torch.ones(1).double(), p / p.sum()]), tolerance=1e-6)


@pytest.mark.parametrize("score", ["exp_kernel"])
@pytest.mark.parametrize("normalizer", ["softmax", "squareplus"])
def test_distant_nodes_have_a_score_of_zero(score, normalizer, backend):
    """exp(−distance²) underflows, without a NaN in any gradient."""
    member = Member(score, normalizer, "receiver")
    edges, n = edges_of("random")
    inputs = problem(member, edges, n, scale=30.0)
    inputs["lengthscale"] = torch.tensor(1.0).double()
    for dtype in DTYPES:
        compare_diffusion(member, edges, n, inputs, backend, dtype, tolerance=1e-4)


def test_sigma_of_either_sign_and_tiny(backend):
    edges, n = edges_of("random")
    member = Member("exp_kernel", "softmax", "receiver")
    for sigma in (-1.5, 1e-3, 10.0):
        inputs = problem(member, edges, n)
        inputs["sigma"] = torch.tensor(sigma).double()
        for dtype in DTYPES:
            # σ² = 100 multiplies the rounding of a score.
            tolerance = 1e-3 if dtype == torch.float32 else 1e-11
            compare_diffusion(member, edges, n, inputs, backend, dtype, tolerance)


@pytest.mark.parametrize("sigma", [0.0, 1e-25])
def test_a_sigma_whose_square_vanishes_has_no_gradient(sigma, backend):
    """d(σ²)/dσ = 2σ; not 2 / σ times what has underflowed."""
    edges, n = edges_of("random")
    x, weight, bias = normal(n, 5), normal(24, 5, seed=1), normal(24, seed=2)
    leaf = torch.tensor(sigma, requires_grad=True)
    f = gf.ops.projected_attention_diffusion(
        x.float(),
        weight.float(),
        bias.float(),
        gf.Graph.from_edge_index(edges, n),
        heads=3,
        score=gf.ops.ExpKernel(leaf, 10.0),
        edge_weight=1e6 * normal(edges.shape[1], seed=3).float(),
        backend=backend,
    )
    (dsigma,) = torch.autograd.grad((f * normal(n, 5, seed=4).float()).sum(), leaf)
    assert abs(float(dsigma)) < 1e-15


def test_lanes_without_a_head_have_no_part(backend):
    """Three heads fill up four lanes; there exp of a weight alone would be infinite."""
    member = Member("exp_kernel", "softmax", "receiver")
    edges, n = edges_of("random")
    inputs = problem(member, edges, n)
    inputs["edge_weight"] = torch.linspace(80.0, 100.0, edges.shape[1]).double()
    compare_diffusion(member, edges, n, inputs, backend, torch.float32, 1e-4)


def test_exp_kernel_far_from_the_origin(backend):
    """Distances do not change with the origin, and keep digits: 300² is rounded to 0.01."""
    edges, n = edges_of("random")
    member = Member("exp_kernel", "softmax", "receiver")
    inputs = problem(member, edges, n)
    for name in ("q", "k"):
        inputs[name] += 300.0
    compare_diffusion(member, edges, n, inputs, backend, torch.float32, 2e-3)


@members(dtype=[torch.float16, torch.bfloat16])
def test_half_types_through_the_reference(member, dtype):
    """`auto` on a CPU; sums are wide. Prepared q and k and their gradients are rounded too."""
    edges, n = edges_of("random")
    compare_diffusion(
        member, edges, n, problem(member, edges, n), "auto", dtype, 2 * TOLERANCE[dtype]
    )


def test_parameters_may_be_of_another_type_or_shape():
    edges, n = edges_of("random")
    graph = gf.Graph.from_edge_index(edges, n)
    q, k = normal(2, n, 2, 3).float()
    want = edge_attention(q, k, graph, score=gf.ops.ExpKernel(1.5, 0.7))
    for sigma, length in (
        (torch.tensor(1.5), torch.tensor([0.7])),
        (torch.tensor([[1.5]], dtype=torch.float64), 0.7),
        (torch.tensor(1.5, dtype=torch.bfloat16), 0.7),
    ):
        assert_close("a", edge_attention(q, k, graph, score=gf.ops.ExpKernel(sigma, length)), want)
