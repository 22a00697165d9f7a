"""Order of convergence and parity with the peer whose names are used."""

import math

import pytest
import torch
import torchdiffeq

import grand_fast as gf
from grand_fast.solvers import METHODS
from grand_fast.solvers._runge_kutta import ButcherTableau
from grand_fast.solvers.euler import EULER
from grand_fast.solvers.midpoint import MIDPOINT
from grand_fast.solvers.rk4 import CLASSIC, THREE_EIGHTHS
from grand_fast.testing import assert_close

ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4, "rk4_classic": 4, "dopri5": 5, "bosh3": 3,
          "adaptive_heun": 2}  # fmt: skip
FIXED = ("euler", "midpoint", "rk4", "rk4_classic")
TABLEAUX = {"midpoint": MIDPOINT, "euler": EULER, "rk4": THREE_EIGHTHS, "rk4_classic": CLASSIC}


def diffusion_matrix(n=12):
    weights = torch.rand(n, n, dtype=torch.float64)
    return weights / weights.sum(1, keepdim=True) - torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("method", FIXED)
def test_order_of_convergence(method):
    a = diffusion_matrix()
    x0 = torch.randn(12, 3, dtype=torch.float64)
    T = 2.0
    want = torch.linalg.matrix_exp(a * T) @ x0
    steps = [4, 8, 16, 32]
    errors = []
    for n in steps:
        solution = gf.integrate(lambda t, x: a @ x, x0, T, method=method, step_size=T / n)
        errors.append(math.log(float((solution.x - want).norm())))
    logs = [math.log(n) for n in steps]
    mean_l, mean_e = sum(logs) / len(logs), sum(errors) / len(errors)
    slope = sum((x - mean_l) * (e - mean_e) for x, e in zip(logs, errors, strict=True)) / sum(
        (x - mean_l) ** 2 for x in logs
    )
    assert abs(-slope - ORDERS[method]) < 0.2


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
    assert abs(math.log2(errors[0] / errors[1]) - ORDERS[method]) < 0.3


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
    from grand_fast.solvers._term import FunctionTerm

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
