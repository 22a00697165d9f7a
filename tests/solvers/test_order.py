"""Order of convergence and parity with the peer whose names are used."""

import functools
import math

import numpy
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp

import grand_fast as gf
from grand_fast.solvers import ADAPTIVE, METHODS, SemiImplicitEuler
from grand_fast.solvers.methods.runge_kutta import ButcherTableau
from grand_fast.solvers.methods.tableaux import CLASSIC, EULER, MIDPOINT, THREE_EIGHTHS
from grand_fast.testing import assert_close
from tests._pairwise import pairwise
from tests.solvers._terms import (
    linear_problem,
    linear_term,
    nonlinear_problem,
    nonlinear_term,
)

# Order at the ends of steps, and between them
ORDERS = {
    "euler": (1, 1), "midpoint": (2, 2), "rk4": (4, 2), "rk4_classic": (4, 2),
    "dopri5": (5, 5), "bosh3": (3, 3), "adaptive_heun": (2, 2),
    "explicit_adams": (4, 2), "implicit_adams": (4, 2), "semi_implicit_euler": (1, 1),
}  # fmt: skip
FIXED = ("euler", "midpoint", "rk4", "rk4_classic")
TABLEAUX = {"midpoint": MIDPOINT, "euler": EULER, "rk4": THREE_EIGHTHS, "rk4_classic": CLASSIC}
T = 2.0
FIRST, FINEST = 16, 128  # steps of the coarsest and the finest grid


def solver(method):
    if method == "semi_implicit_euler":
        return SemiImplicitEuler(tol=1e-13)
    return METHODS[method](1e-13, 1e-13)


@functools.cache
def problem(kind):
    """A term of the operators, an initial state, and the solution as a function of time."""
    if kind == "linear":
        graph, leaves = linear_problem()
        term, x0 = linear_term(graph, leaves), leaves["x0"]
    else:
        field, graph = nonlinear_problem()
        x0 = torch.randn(8, 4, dtype=torch.float64, generator=torch.manual_seed(5))
        with torch.no_grad():  # far from linear
            field.query.weight.mul_(3)
        term = nonlinear_term(field, graph, x0)

    def f(t, y):
        with torch.no_grad():
            return term.vf(t, torch.from_numpy(y).view_as(x0)).flatten().numpy()

    exact = solve_ivp(
        f, (0, T), x0.flatten().numpy(), "DOP853", rtol=1e-13, atol=1e-15,
        t_eval=numpy.linspace(0, T, 1 + 4 * FINEST), max_step=T / 64,
    )  # fmt: skip
    states = torch.from_numpy(exact.y.T).view(-1, *x0.shape)
    return term, x0, lambda t: states[round(t / T * 4 * FINEST)]


@torch.no_grad()
def errors(method, kind, n):
    """Largest error at the ends of `n` equal steps, and at the quarters between."""
    term, x0, exact = problem(kind)
    chosen, tau = solver(method), T / n
    x, carry = x0, chosen.start(term, 0.0, x0)
    at_ends, between = 0.0, 0.0
    for i in range(n):
        t = i * tau
        step = chosen.step(term, t, x, tau, carry)
        for theta in (0.25, 0.5, 0.75):
            y = chosen.interpolate(x, step, tau, theta)
            between = max(between, float((y - exact(t + theta * tau)).abs().max()))
        x, carry = step.x, step.carry
        at_ends = max(at_ends, float((x - exact(t + tau)).abs().max()))
    return at_ends, between


def order(values):
    """Fitted slope over grids, each twice as fine as the last."""
    logs = [math.log2(v) for v in values]
    return float(numpy.polyfit(range(len(logs)), logs, 1)[0]) * -1


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("method", ORDERS)
def test_order_of_convergence(method, kind):
    """Over three halvings, at the ends of steps and between them."""
    found = [errors(method, kind, FIRST * 2**k) for k in range(4)]
    for values, want in zip(zip(*found, strict=True), ORDERS[method], strict=True):
        assert abs(order(values) - want) < 0.2, values


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("method", FIXED)
def test_integrate_takes_these_steps(method, kind):
    term, x0, exact = problem(kind)
    with torch.no_grad():
        solution = gf.integrate(term, x0, T, method=method, step_size=T / 16)
    error = float((solution.x - exact(T)).abs().max())
    assert 0 < error <= errors(method, kind, 16)[0]


@pairwise(method=list(ADAPTIVE), kind=["linear", "nonlinear"], end=["clamp", "interp"])
def test_error_follows_the_tolerance(method, kind, end):
    """At output times too, whichever way they are reached."""
    term, x0, exact = problem(kind)
    times = [T * k / 16 for k in range(1, 17)]
    found = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        with torch.no_grad():
            solution = gf.integrate(
                term, x0, T, method=method, rtol=tolerance, atol=tolerance, times=times, end=end
            )
        want = torch.stack([exact(t) for t in times])
        found.append(float((solution.check().xs - want).abs().max()) / tolerance)
    assert max(found) < 10, found


def diffusion_matrix(n=12):
    weights = torch.rand(n, n, dtype=torch.float64)
    return weights / weights.sum(1, keepdim=True) - torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("method", FIXED)
def test_order_with_a_field_that_depends_on_time(method):
    def f(t, x):
        return math.cos(t) * x

    x0 = torch.ones(1, dtype=torch.float64)
    want = math.exp(math.sin(2.0))
    errors = [
        abs(float(gf.integrate(f, x0, 2.0, method=method, step_size=h).x) - want)
        for h in (0.1, 0.05)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - ORDERS[method][0]) < 0.3


@pytest.mark.parametrize("name", TABLEAUX)
def test_stage_values_are_the_tableau(name):
    """The step without stored slopes equals the textbook step."""
    tableau: ButcherTableau = TABLEAUX[name]
    a = diffusion_matrix()
    x, t, tau = torch.randn(12, 2, dtype=torch.float64), 0.3, 0.7

    def f(t, x):
        return torch.sin(a @ x) + t

    slopes = []
    for c, row in zip(tableau.c, ((), *tableau.a), strict=True):
        y = x + tau * sum((float(w) * k for w, k in zip(row, slopes, strict=True)), 0 * x)
        slopes.append(f(t + float(c) * tau, y))
    want = x + tau * sum(float(w) * k for w, k in zip(tableau.b, slopes, strict=True))
    from grand_fast.solvers.term import FunctionTerm

    got = METHODS[name](0.0, 0.0).step(FunctionTerm(f), t, x, tau, ()).x
    assert_close("step", got, want, tolerance=1e-14)


@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize(("T", "step_size"), [(1.0, 0.1), (1.0, 0.3), (0.3, 0.1), (1.1, 0.1)])
def test_agrees_with_torchdiffeq(method, T, step_size):
    a = diffusion_matrix()
    x0 = torch.randn(12, 2, dtype=torch.float64)
    got = gf.integrate(lambda t, x: a @ x, x0, T, method=method, step_size=step_size)
    grid = torch.tensor([0.0, T], dtype=torch.float64)
    want = torchdiffeq.odeint(
        lambda t, x: a @ x, x0, grid, method=method, options={"step_size": step_size}
    )
    assert_close("x(T)", got.x, want[-1], tolerance=1e-13)
