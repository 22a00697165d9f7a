"""Scores of up to 10⁵: weights sum to one, and gradients that vanish do.

Float32 holds a score of 10⁴ to 10⁻³, so a weight can be no better than that; but all that is
made of the same scores must agree, or what cancels does not.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import grand_fast as gf
from grand_fast.kernels.attention_diffusion import cpu
from grand_fast.kernels.cpu.rows import CUT_FROM
from grand_fast.kernels.weighting import Weighting
from grand_fast.ops.backends import plan
from grand_fast.testing import random_edge_index
from tests.ops._problems import normal

pytestmark = pytest.mark.usefixtures("nan_filled")

EPS = torch.finfo(torch.float32).eps
N, D, D_K = 110, 7, 5


class Case(NamedTuple):
    """What is asked of the operators; `size` is about that of the largest score."""

    size: float
    score: str
    normalizer: str
    normalize: str
    kind: str
    heads: int
    weighted: bool

    def __str__(self) -> str:
        sizes = (f"{self.size:g}", f"H{self.heads}", "w" * self.weighted)
        return "-".join(filter(None, (*self[1:5], *sizes)))


SOFTMAX, SQUAREPLUS, RECEIVER, SENDER = "softmax", "squareplus", "receiver", "sender"
# Every pair of values occurs.
CASES = [
    Case(30, "scaled_dot", SOFTMAX, RECEIVER, "random", 1, False),
    Case(30, "gat", SQUAREPLUS, SENDER, "hub", 3, True),
    Case(30, "exp_kernel", SOFTMAX, SENDER, "empty_rows", 4, False),
    Case(1e3, "scaled_dot", SQUAREPLUS, RECEIVER, "hub", 4, True),
    Case(1e3, "gat", SOFTMAX, SENDER, "random", 1, True),
    Case(1e3, "exp_kernel", SQUAREPLUS, RECEIVER, "empty_rows", 3, False),
    Case(1e3, "exp_kernel", SOFTMAX, RECEIVER, "empty_rows", 3, True),
    Case(3e4, "scaled_dot", SOFTMAX, SENDER, "hub", 3, False),
    Case(3e4, "scaled_dot", SOFTMAX, RECEIVER, "empty_rows", 4, True),
    Case(3e4, "scaled_dot", SQUAREPLUS, SENDER, "random", 4, False),
    Case(3e4, "gat", SOFTMAX, RECEIVER, "hub", 4, False),
    Case(3e4, "exp_kernel", SOFTMAX, RECEIVER, "hub", 1, True),
    Case(3e4, "gat", SQUAREPLUS, RECEIVER, "empty_rows", 1, True),
    Case(2e5, "scaled_dot", SOFTMAX, RECEIVER, "random", 2, False),
    Case(2e5, "scaled_dot", SOFTMAX, SENDER, "random", 2, False),
    Case(2e5, "scaled_dot", SQUAREPLUS, RECEIVER, "hub", 1, False),
]
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


def edges_of(case: Case) -> Tensor:
    """The hubs have more edges than a row may have that is not cut into pieces."""
    edges, _ = random_edge_index(case.kind, N)
    if case.kind == "hub":
        assert edges[1].bincount().max() > CUT_FROM and edges[0].bincount().max() > CUT_FROM
    return edges


def problem(case: Case, edges: Tensor) -> dict[str, Tensor]:
    """Inputs in float64 that float32 holds; scores as large as `case.size`, of both signs."""
    d_k = 1 if case.score == "gat" else D_K
    given = {
        "x": normal(N, D, seed=1),
        "q": normal(N, case.heads, d_k, seed=2),
        "k": normal(N, case.heads, d_k, seed=3),
    }
    if case.weighted:
        given["edge_weight"] = normal(edges.shape[1], seed=4)
    if case.score == "exp_kernel":
        # Near each other, where σ² and weights have effect.
        given |= {name: 0.3 * given[name] for name in "qk"}
        given["sigma"] = torch.tensor(1.0 if case.weighted else case.size**0.5)
        if case.weighted:
            given["edge_weight"] *= case.size / 3
    else:
        power = 1 if case.score == "gat" else 0.5
        given |= {name: (case.size / 3) ** power * given[name] for name in "qk"}
    return {name: value.float().double() for name, value in given.items()}


def options_of(case: Case, leaves: dict[str, Tensor]) -> dict[str, object]:
    score = gf.ops.ExpKernel(sigma=leaves["sigma"]) if "sigma" in leaves else case.score
    return {
        "score": score,
        "normalizer": case.normalizer,
        "normalize": case.normalize,
        "edge_weight": leaves.get("edge_weight"),
    }


def results(case, edges, given, dtype, backend, operator) -> dict[str, Tensor]:
    """The output and every gradient."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in given.items()}
    graph, options = gf.Graph.from_edge_index(edges, N), options_of(case, leaves)
    if operator == "attention_diffusion":
        out = gf.ops.attention_diffusion(
            leaves["x"], leaves["q"], leaves["k"], graph, backend=backend, **options
        )
    else:
        del leaves["x"]
        out = gf.ops.edge_attention(leaves["q"], leaves["k"], graph, backend=backend, **options)
    upstream = normal(*out.shape, seed=5).to(dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    names = [f"d{name}" for name in leaves]
    return {"output": out.detach(), **dict(zip(names, grads, strict=True))}


def largest_score(case: Case, edges: Tensor, given: dict[str, Tensor]) -> float:
    if case.score == "exp_kernel":
        return case.size
    q, k = given["q"][edges[1]], given["k"][edges[0]]
    s = (q + k).squeeze(2) if case.score == "gat" else (q * k).sum(2) / D_K**0.5
    w = given.get("edge_weight")
    return float((s if w is None else s * w[:, None]).abs().max())


@EVERY
@pytest.mark.parametrize("operator", ["attention_diffusion", "edge_attention"])
def test_as_near_to_float64_as_the_reference(operator, case):
    edges = edges_of(case)
    given = problem(case, edges)
    s = largest_score(case, edges, given)
    assert case.size / 3 < s < 20 * case.size
    want = results(case, edges, given, torch.float64, "reference", operator)
    other = results(case, edges, given, torch.float32, "reference", operator)
    got = results(case, edges, given, torch.float32, "cpu", operator)
    # A gradient by a score is a difference of terms of the size of those by weights.
    vectors = max(float(given[name].detach().abs().max()) for name in "qk")
    for name, value in got.items():
        assert value.isfinite().all(), name
        error = float((value.double() - want[name]).abs().max())
        allowed = 2 * float((other[name].double() - want[name]).abs().max())
        allowed += EPS * max(1.0, s) * float(want[name].abs().max())
        allowed += 20 * EPS * max(1.0, vectors if name in ("dq", "dk") else 1.0)
        if name in ("dedge_weight", "dsigma"):
            allowed += 20 * EPS * s
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@EVERY
def test_weights_sum_to_one(case, backend):
    edges = edges_of(case)
    leaves = {name: value.float() for name, value in problem(case, edges).items()}
    graph = gf.Graph.from_edge_index(edges, N)
    a = gf.ops.edge_attention(
        leaves["q"], leaves["k"], graph, backend=backend, **options_of(case, leaves)
    )
    assert a.min() >= 0 and a.max() <= 1 + 2 * EPS
    group = edges[1] if case.normalize == RECEIVER else edges[0]
    sums = torch.zeros(N, case.heads, dtype=torch.float64).index_add(0, group, a.double())
    assert (sums[group.unique()] - 1).abs().max() < 1e-5
    constant = gf.ops.attention_diffusion(
        torch.ones(N, 3), leaves["q"], leaves["k"], graph, backend=backend,
        **options_of(case, leaves),
    )  # fmt: skip
    if case.normalize == RECEIVER:  # a constant state is a fixed point
        assert constant[group.unique()].abs().max() < 1e-5


@pytest.mark.parametrize("size", [300.0, 3000.0])
def test_gradients_that_vanish(size, backend):
    """One sender wins every row: no small change of a score changes anything."""
    torch.manual_seed(0)
    edges = torch.randint(0, 40, (2, 200))
    x, (q, k) = torch.randn(40, 8), (size * torch.randn(40, 2, 4) for _ in "qk")
    q.requires_grad_()
    graph = gf.Graph.from_edge_index(edges, 40)
    gf.ops.attention_diffusion(x, q, k, graph, backend=backend).pow(2).sum().backward()
    assert q.grad is not None and q.grad.abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["random", "hub"])
@pytest.mark.parametrize("normalize", [RECEIVER, SENDER])
def test_backward_with_scores_rounded_otherwise(normalize, kind):
    """Projections made again may differ by roundings: Δ is divided by its own Σ a."""
    case = Case(3e4, "scaled_dot", SOFTMAX, normalize, kind, 2, False)
    edges = edges_of(case)
    graph, given = gf.Graph.from_edge_index(edges, N), problem(case, edges)
    x, q, k = (given[name].float() for name in ("x", "q", "k"))
    x = x[:1].expand(N, D).contiguous()  # whatever the weights: nothing changes with a score
    csr, csr_t = (graph.csr(plan("cpu"), transposed=t) for t in (False, True))
    one = torch.ones(D)
    views = {"weighting": Weighting(D_K**-0.5, normalize=normalize), "csr": csr, "csr_t": csr_t}
    _, norm = cpu.attention_diffusion_fwd(
        x, q * (1 + 8 * EPS), k, alpha=one, beta=None, x0=None, **views
    )
    df = normal(N, D, seed=5).float()
    if normalize == SENDER:
        x, df = normal(N, D, seed=5).float(), x  # t is df · x: alike for the edges of a sender
    grads = cpu.attention_diffusion_bwd(
        df, x, q, k=k, norm=norm, alpha=one, needs_dqk=True, needs_dalpha=False, **views
    )
    assert grads.dq is not None and grads.dk is not None
    # Terms of 10⁵ that cancel to a rounding; not divided, hundreds are left.
    assert max(float(grads.dq.abs().max()), float(grads.dk.abs().max())) < 1


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("normalizer", [SOFTMAX, SQUAREPLUS])
def test_of_projections(normalizer, heads, backend):
    """Also where the keys' projection is absorbed into the queries."""
    edges, _ = random_edge_index("random", N)
    given = {
        "x": normal(N, D, seed=1) * 30,
        "weight": normal(2 * heads * D_K, D, seed=2),
        "bias": normal(2 * heads * D_K, seed=3) * 10,
    }

    def run(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        leaves = {name: value.float().to(dtype).requires_grad_() for name, value in given.items()}
        graph = gf.Graph.from_edge_index(edges, N)
        f = gf.ops.projected_attention_diffusion(
            *leaves.values(), graph, heads=heads, normalizer=normalizer, backend=backend
        )
        upstream = normal(N, D, seed=5).to(dtype)
        grads = torch.autograd.grad(f, list(leaves.values()), upstream)
        return {"f": f.detach(), **dict(zip(leaves, grads, strict=True))}

    want, other = run(torch.float64, "reference"), run(torch.float32, "reference")
    for name, value in run(torch.float32, backend).items():
        error = float((value.double() - want[name]).abs().max())
        allowed = 2 * float((other[name].double() - want[name]).abs().max())
        allowed += EPS * 3e4 * float(want[name].abs().max())
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
