"""Terms and their sums against a plain function on dense matrices, by the same solver."""

import pytest
import torch
from torch import nn

import grand_fast as gf
from grand_fast.solvers import ContinuousOptions, SemiImplicitEuler, combination
from grand_fast.testing import assert_close, random_graph
from tests._pairwise import pairwise
from tests.conftest import BACKENDS
from tests.nn._dense import dense_attention

N, D = 9, 3
GRAPH = random_graph("empty_rows", N)
SENDER, RECEIVER = GRAPH.edge_index()
F64 = torch.float64


class Problem(nn.Module):
    """All that the terms below depend on; a layer with a source, weights in the user's order."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(0.4 * torch.randn(N, D, dtype=F64))
        self.source = nn.Parameter(torch.randn(N, D, dtype=F64))
        self.a = nn.Parameter(torch.rand(GRAPH.num_edges, dtype=F64) / 5)
        self.scalar = nn.Parameter(torch.tensor(0.4, dtype=F64))
        self.channels = nn.Parameter(torch.tensor([0.3, 0.6, 0.9], dtype=F64))
        self.layer = gf.nn.AttentionDiffusion(D, 4, 2, source=True).double()
        self.plain = gf.nn.AttentionDiffusion(D, 4, 2).double()
        nn.init.constant_(self.layer.scale.beta, 0.3)

    def matrix(self):
        index = RECEIVER * N + SENDER
        return self.a.new_zeros(N * N).index_add(0, index, self.a).view(N, N)

    def diffusion(self, x):
        return self.matrix() @ x - x

    def attention(self, layer, x):
        ax = dense_attention(layer, x, GRAPH, None).mean(0) @ x
        source = 0 if layer.scale.beta is None else layer.scale.beta * self.source
        return layer.scale.alpha * (ax - x) + source

    def leaves(self):
        return [p for n, p in self.named_parameters() if not n.endswith("key.bias")]  # 0


class Growth(nn.Module):
    """A function of the user's own."""

    def forward(self, t, x):
        return t * x


def pair_of(force, state):
    y, x = state.chunk(2, 1)
    return torch.cat([force(x, y), y], 1)


def linear(p, **options):
    return gf.terms.linear(p.a, GRAPH, **options)


def attention(p):
    return gf.terms.attention(p.layer, GRAPH, p.source)


# Of a problem: the term; f of a state by plain operations
CASES = {
    "linear": (lambda p: linear(p, alpha=p.scalar), lambda p, x: p.scalar * p.diffusion(x)),
    "linear, source": (
        lambda p: linear(p, alpha=0.8) + gf.terms.source(p.source, p.channels),
        lambda p, x: 0.8 * p.diffusion(x) + p.channels * p.source,
    ),
    "attention": (attention, lambda p, x: p.attention(p.layer, x)),
    "GREAD-AC": (
        lambda p: attention(p) + gf.terms.reaction("allen_cahn", p.channels),
        lambda p, x: p.attention(p.layer, x) + p.channels * (x - x**3),
    ),
    "a function": (
        lambda p: Growth() + sum([0.5 * attention(p), -gf.terms.reaction("fisher")]),
        lambda p, x: 0.5 * p.attention(p.layer, x) - x + x**2,
    ),
    "two with edges": (
        lambda p: attention(p) + p.scalar * (gf.terms.reaction("zeldovich", 2) - linear(p)),
        lambda p, x: p.attention(p.layer, x) + p.scalar * (2 * x**2 * (1 - x) - p.diffusion(x)),
    ),
    "one leaf twice": (
        lambda p: p.scalar * linear(p, alpha=p.scalar) + linear(p, alpha=p.scalar),
        lambda p, x: (p.scalar**2 + p.scalar) * p.diffusion(x),
    ),
    "GREAD-BS": (
        lambda p: gf.terms.blurring_sharpening(linear(p, alpha=p.channels), p.scalar),
        lambda p, x: p.channels * p.diffusion(x) - p.scalar * p.matrix() @ p.diffusion(x),
    ),
    "sharpened attention": (
        lambda p: gf.terms.blurring_sharpening(attention(p), 0.7),
        lambda p, x: p.attention(p.layer, x)
        - 0.7 * (w := dense_attention(p.layer, x, GRAPH, None).mean(0)) @ (w @ x - x),
    ),
    "GraphCON": (
        lambda p: gf.terms.graphcon(linear(p), gamma=0, alpha=p.scalar),
        lambda p, s: pair_of(lambda x, y: p.diffusion(x) - p.scalar * y, s),
    ),
    "GraphCON, source": (
        lambda p: gf.terms.graphcon(
            gf.terms.attention(p.plain, GRAPH) + gf.terms.source(p.source),
            gamma=p.channels, activation=torch.tanh,
        ),
        lambda p, s: pair_of(
            lambda x, y: torch.tanh(p.attention(p.plain, x) + p.source) - p.channels * x - y, s
        ),
    ),
}  # fmt: skip
SOLVES = {
    "rk4, direct": {"method": "rk4", "step_size": 0.3, "adjoint": "direct"},
    "rk4, checkpoint": {"method": "rk4", "step_size": 0.3, "adjoint": "checkpoint"},
    "dopri5": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4, "adjoint": "checkpoint"},
    "adams": {"method": "explicit_adams", "step_size": 0.15},
    "continuous": {
        "method": "rk4", "step_size": 0.1, "adjoint": "continuous",
        "adjoint_options": ContinuousOptions(method="rk4", step_size=0.05),
    },
}  # fmt: skip


def solved(problem, f, **options):
    x = problem.x
    if "GraphCON" in options.pop("case"):
        x = torch.cat([0.3 * problem.source, x], 1)
    x = gf.integrate(f, x, 0.6, **options).x
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=F64).view_as(x)
    return x, torch.autograd.grad((weights * x).sum(), problem.leaves(), allow_unused=True)


def compare(problem, got, want, tolerance):
    assert_close("x", got[0], want[0], tolerance=tolerance)
    scale = max(float(g.abs().max()) for g in want[1] if g is not None)
    for (name, _), own, other in zip(
        ((n, p) for n, p in problem.named_parameters() if not n.endswith("key.bias")),
        got[1], want[1], strict=True,
    ):  # fmt: skip
        if other is None:
            assert own is None or not own.any(), name
        else:
            error = float((own - other).abs().max())
            assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pairwise(case=list(CASES), solve=list(SOLVES), backend=BACKENDS)
def test_a_term_is_its_equation(case, solve, backend):
    problem, options = Problem(), SOLVES[solve]
    make, f = CASES[case]
    more = Growth() if case == "a function" else lambda t, x: 0
    with gf.backend(backend):
        got = solved(problem, make(problem), case=case, **options)
    plain = {k: v for k, v in options.items() if "adjoint" not in k}
    want = solved(
        problem, lambda t, x: f(problem, x) + more(t, x), case=case, adjoint="direct", **plain
    )
    # The gradient of the equation, which is not that of the steps: their error is of order 4
    compare(problem, got, want, 1e-4 if solve == "continuous" else 1e-11)


HELD = {  # of a problem and a state: A, alpha, and all else at the start of a step
    "linear, source": lambda p, x: (p.matrix(), 0.8, p.channels * p.source),
    "GREAD-AC": lambda p, x: (
        dense_attention(p.layer, x, GRAPH, None).mean(0),
        p.layer.scale.alpha,
        p.layer.scale.beta * p.source + p.channels * (x - x**3),
    ),
}


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
@pytest.mark.parametrize("case", HELD)
def test_a_step_with_the_matrix_held(case, adjoint):
    problem, tau = Problem(), 0.5
    method = SemiImplicitEuler(tol=1e-14)
    term = CASES[case][0](problem)
    got = solved(problem, term, case=case, method=method, step_size=0.3, adjoint=adjoint)
    tau = 0.3

    def implicit(t, x):  # such that Euler's step is the semi-implicit one
        a, alpha, source = HELD[case](problem, x)
        eye = torch.eye(N, dtype=F64)
        y = torch.linalg.solve((1 + tau * alpha) * eye - tau * alpha * a, x + tau * source)
        return (y - x) / tau

    want = solved(problem, implicit, case=case, method="euler", step_size=tau, adjoint="direct")
    compare(problem, got, want, 1e-11)


def test_a_linear_sum_is_solved_exactly():
    problem = Problem()
    term = linear(problem, alpha=0.5) + gf.terms.source(problem.source, problem.channels)
    term = problem.scalar * (term + gf.terms.source(problem.x.detach()))
    got = solved(problem, term, case="", method="uniformisation")
    want = solved(problem, term, case="", method="dopri5", rtol=1e-11, atol=1e-11)
    compare(problem, got, want, 1e-8)


def test_an_evaluation_is_one_pass(monkeypatch):
    """Of the operator, whose kernel adds what a step and the other terms have."""

    def refused(terms, **options):
        raise AssertionError("a pass of its own")

    problem = Problem()
    term = attention(problem) + gf.terms.source(problem.x, problem.channels)
    term = 2.0 * (term + gf.terms.reaction("allen_cahn", 0.3))
    want = gf.integrate(lambda t, x: term.vf(t, x), problem.x, 1.0, method="rk4").x
    planned = term.planned(problem.x)
    assert planned.returns_new
    monkeypatch.setattr(combination, "stage_update", refused)
    planned.axpy(0.0, problem.x, combination.Combination([(1.0, problem.x)]), 0.1)
    planned.split_constant()
    monkeypatch.undo()
    solution = gf.integrate(term, problem.x, 1.0, method="rk4")
    assert_close("x", solution.x, want)
    assert solution.stats.nfe == 4


def test_a_term_outlives_a_solve():
    problem = Problem()
    scale, x = nn.Parameter(problem.channels.detach()), problem.x.detach()

    def made():
        return linear(problem, alpha=scale) + gf.terms.source(problem.source, scale)

    term = made()
    for _ in range(2):
        got = gf.integrate(term, x, 1.0, method="rk4").x
        assert torch.equal(got, gf.integrate(made(), x, 1.0, method="rk4").x)
        got.sum().backward()
        with torch.no_grad():
            scale.mul_(0.5)


def refused(problem):
    layer, x = problem.layer, problem.x.detach()
    reaction, given = gf.terms.reaction("fisher"), linear(problem)
    yield lambda: gf.terms.linear(problem.a[1:], GRAPH), ValueError, r"linear: `a` must have shape"
    yield lambda: gf.terms.linear(problem.a[:, None], GRAPH), ValueError, r"a.mean\(1\)"
    yield lambda: gf.terms.linear(problem.a, GRAPH, alpha="1"), TypeError, "`alpha` must be a float"
    yield lambda: gf.terms.attention(nn.Linear(D, D), GRAPH), TypeError, "AttentionDiffusion"
    yield lambda: gf.terms.attention(layer, GRAPH), ValueError, "`x0` must be given"
    yield lambda: gf.terms.attention(problem.plain, GRAPH, x), ValueError, "and only then, got a"
    yield lambda: gf.terms.attention(layer, GRAPH, x[1:]), ValueError, "`x0` must have shape"
    yield lambda: gf.terms.source(x.long()), TypeError, "`x0` must be floating"
    yield lambda: gf.terms.source(1.0), TypeError, "`x0` must be a Tensor"
    yield lambda: gf.terms.reaction("turing"), ValueError, "must be one of fisher, allen_cahn"
    yield lambda: gf.terms.reaction("fisher", 1j), TypeError, "`coefficient` must be a float"
    yield lambda: gf.terms.blurring_sharpening(reaction), TypeError, "gf.terms.linear or"
    yield lambda: gf.terms.graphcon(x), TypeError, "`coupling` must be a term or a function"
    yield lambda: gf.terms.graphcon(given, activation=2), TypeError, "`activation` must be"
    yield lambda: given + x, TypeError, "unsupported operand"
    yield lambda: given * "2", TypeError, "can't multiply|unsupported operand"
    yield lambda: torch.tensor(1) * given, TypeError, "`scale` must be floating"
    yield lambda: torch.ones(N, 1) * given, ValueError, "must be a scalar or have shape"

    def solve(term, **options):
        return lambda: gf.integrate(term, x, 1.0, **options)

    yield solve(gf.terms.graphcon(given)), ValueError, r"\[N, 2d\].*torch.cat\(\[y, x\], 1\)"
    yield solve(given + gf.terms.source(x[:1])), ValueError, "must return f like x"
    yield solve(given + (lambda t, x: x.sum())), ValueError, "must return f like x"
    semi, exact = {"method": "semi_implicit_euler"}, {"method": "uniformisation"}
    yield solve(reaction + gf.terms.source(x), **semi), TypeError, "part with a matrix, got 0 in"
    yield solve(given + attention(problem), **semi), TypeError, "got 2 in Constant"
    yield solve(given + reaction, **exact), TypeError, "must be linear.*got Reaction"
    yield solve(given + given, **exact), TypeError, "part with a matrix, got 2"
    yield solve(gf.terms.source(x), **exact), TypeError, "part with a matrix, got 0"


@pytest.mark.parametrize("number", range(26))
def test_what_does_not_fit_is_refused(number):
    call, error, match = list(refused(Problem()))[number]
    with pytest.raises(error, match=match):
        call()


def test_a_compiler_makes_one_program_of_a_sum():
    def solve(problem):
        term = linear(problem) + gf.terms.reaction("allen_cahn", problem.channels)
        return gf.integrate(0.5 * term, problem.x, 0.6, method="euler").x

    problem = Problem()
    compiled = torch.compile(solve, backend="eager", fullgraph=True)
    assert_close("x", compiled(problem), solve(problem))
