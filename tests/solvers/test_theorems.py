"""What the paper proves of its schemes: theorems 1 and 2, and the maximum principle, equation 3."""

import pytest
import torch

import grand_fast as gf
from grand_fast.nn.terms import LinearDiffusion, NonlinearDiffusion
from grand_fast.solvers import SemiImplicitEuler
from grand_fast.testing import random_graph
from tests.solvers._terms import dense, linear_problem, nonlinear_problem, row_stochastic

ROUNDING = 1e-13


def diffusion(a, graph):
    return LinearDiffusion(a, graph, alpha=1.0, beta=None, x0=None)


def is_within(x, x0, slack=ROUNDING):
    """Each channel between the least and the largest value it started from."""
    return bool((x <= x0.amax(0) + slack).all() and (x >= x0.amin(0) - slack).all())


def swap():
    """Two nodes without loops that listen to each other alone: eigenvalues 0 and −2."""
    graph = gf.Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 2)
    x0 = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    return diffusion(torch.ones(2, dtype=torch.float64), graph), x0


def step_matrix(term, n, tau, method):
    """Q of one step, `x(tau) = Q x(0)`."""
    eye = torch.eye(n, dtype=torch.float64)
    return gf.integrate(term, eye, tau, method=method).x


@pytest.mark.parametrize("tau", [0.01, 0.5, 0.99, 1.0])
def test_theorem_1(tau):
    """A step of explicit Euler is a right-stochastic matrix, so that no number of steps grows."""
    graph = random_graph("loops", 15)
    term = diffusion(row_stochastic(graph), graph)
    q = step_matrix(term, 15, tau, "euler")
    assert float(q.min()) >= -ROUNDING
    assert float((q.sum(1) - 1).abs().max()) < ROUNDING
    assert float(torch.linalg.eigvals(q).abs().max()) <= 1 + ROUNDING
    x0 = torch.randn(15, 3, dtype=torch.float64)
    assert is_within(gf.integrate(term, x0, 200 * tau, method="euler", step_size=tau).x, x0)


@pytest.mark.parametrize("tau", [1.01, 1.5, 3.0])
def test_euler_overshoots_beyond_theorem_1(tau):
    """Without loops a step longer than 1 leaves the bounds."""
    term, x0 = swap()
    assert float(step_matrix(term, 2, tau, "euler").min()) < 0
    assert not is_within(gf.integrate(term, x0, tau, method="euler").x, x0)
    growth = gf.integrate(term, x0, 100 * tau, method="euler", step_size=tau).x.abs().max()
    assert float(growth) > 1.5
    implicit = gf.integrate(term, x0, 100 * tau, method="semi_implicit_euler", step_size=tau).x
    assert is_within(implicit, x0)


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0, 2.0, 10.0, 1e2, 1e3])
def test_theorem_2(tau):
    """A step of the implicit scheme is a right-stochastic matrix whatever its length."""
    graph = random_graph("loops", 15)
    a = row_stochastic(graph)
    for choice in ("fixed_point", "bicgstab"):
        method = SemiImplicitEuler(tol=1e-13, linear_solver=choice)
        q = step_matrix(diffusion(a, graph), 15, tau, method)
        b = (1 + tau) * torch.eye(15, dtype=torch.float64) - tau * dense(a, graph)
        assert float((b @ q - torch.eye(15)).abs().max()) < 1e-12 * (1 + tau)
        slack = 1e-12 * (1 + tau)  # the tolerance and the rounding of the system
        assert float(q.min()) >= -slack and float((q.sum(1) - 1).abs().max()) < slack
        assert float(torch.linalg.eigvals(q).abs().max()) <= 1 + slack


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0, 1e3])
def test_theorem_2_for_every_truncation(tau):
    """So is every iterate of its fixed point, of which a step may take as few as one."""
    graph = random_graph("loops", 15)
    term = diffusion(row_stochastic(graph), graph)
    x0 = torch.randn(15, 3, dtype=torch.float64)
    for iterations in range(1, 31):
        method = SemiImplicitEuler(iterations=iterations)
        q = step_matrix(term, 15, tau, method)
        assert float(q.min()) >= -ROUNDING, iterations
        assert float((q.sum(1) - 1).abs().max()) < ROUNDING, iterations
        x = gf.integrate(term, x0, 5 * tau, method=method, step_size=tau).x
        assert is_within(x, x0), iterations


@pytest.mark.parametrize("iterations", [1, 2, 5, None])
@pytest.mark.parametrize("tau", [0.5, 5.0, 1e3])
def test_theorem_2_with_attention(iterations, tau):
    """The matrix changes from step to step, and is right-stochastic at each."""
    field, graph = nonlinear_problem(n=30)
    term = NonlinearDiffusion(gf.nn.AttentionDiffusion(4, heads=2, alpha=1.0).double(), graph, None)
    x0 = torch.randn(30, 4, dtype=torch.float64)
    method = SemiImplicitEuler(iterations=iterations, tol=1e-12)
    times = [k * tau for k in range(1, 7)]
    with torch.no_grad():
        xs = gf.integrate(term, x0, 6 * tau, method=method, step_size=tau, times=times).xs
    for before, after in zip([x0, *xs], xs, strict=False):
        assert is_within(after, before, slack=1e-10)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "uniformisation", "semi_implicit_euler"])
def test_maximum_principle_of_linear_diffusion(method):
    """Equation 3: the largest value never rises, the smallest never falls."""
    graph, leaves = linear_problem("loops", n=20)
    term, x0 = diffusion(leaves["a"], graph), leaves["x0"]
    times = [0.25 * k for k in range(41)]
    options = {} if method == "dopri5" else {"step_size": 0.25}
    xs = gf.integrate(term, x0, 10.0, method=method, times=times, **options).xs
    slack = 1e-6 if method in ("dopri5", "semi_implicit_euler") else ROUNDING  # their tolerances
    for before, after in zip(xs, xs[1:], strict=False):
        assert is_within(after, before, slack)
    assert is_within(xs[-1], x0, slack=0.0)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_maximum_principle_of_attention(method):
    """Equation 3 for GRAND-nl."""
    _, graph = nonlinear_problem(n=30)
    term = NonlinearDiffusion(gf.nn.AttentionDiffusion(4, heads=2, alpha=1.0).double(), graph, None)
    x0 = torch.randn(30, 4, dtype=torch.float64)
    times = [0.25 * k for k in range(21)]
    options = {} if method == "dopri5" else {"step_size": 0.25}
    with torch.no_grad():
        xs = gf.integrate(term, x0, 5.0, method=method, times=times, **options).xs
    for before, after in zip(xs, xs[1:], strict=False):
        assert is_within(after, before, slack=1e-6)
