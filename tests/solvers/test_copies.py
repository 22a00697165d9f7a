"""A solve gives out memory of its own, also where nothing happens to the state."""

import pytest
import torch

import grand_fast as gf
from grand_fast.solvers import METHODS
from grand_fast.testing import random_graph
from tests.solvers._terms import GRADIENTS, linear_problem, linear_term

F64 = torch.float64


def decay(t, x):
    return -x


def assert_own(y, x):
    """`y` equals `x`, and what is written into it does not show there."""
    assert torch.equal(y, x)
    before = x.clone()
    y.fill_(7.0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("adjoint", GRADIENTS)
@pytest.mark.parametrize("method", METHODS)
def test_no_time(method, adjoint):
    if adjoint == "regularized" and METHODS[method](1.0, 1.0).wants_matrix:
        pytest.skip("takes a matrix")
    leaf = torch.randn(3, 2, dtype=F64, requires_grad=True)
    x0 = leaf * 1  # which may be written, as a leaf may not
    options = {"method": method, "times": [0.0], **GRADIENTS[adjoint]}
    solution = gf.integrate(decay, x0, 0.0, **options).check()
    (dx,) = torch.autograd.grad((solution.x * 3 + solution.xs[0]).sum(), leaf, retain_graph=True)
    assert torch.equal(dx, torch.full_like(dx, 4.0))
    for y in (solution.x, solution.xs[0]):
        assert_own(y.detach(), x0.detach())


@pytest.mark.parametrize("method", METHODS)
def test_no_time_without_gradients(method):
    x0, seen = torch.randn(3, 2), []
    with torch.no_grad():
        x = gf.integrate(decay, x0, 0.0, method=method, observe=lambda t, x: seen.append(t)).x
    assert seen == [0.0]
    assert_own(x, x0)


def test_a_solve_that_gives_up_at_its_start():
    x0 = torch.randn(3, 2, dtype=F64)
    solution = gf.integrate(decay, x0, 1.0, method="dopri5", max_nfe=1)
    assert solution.status is gf.Status.MAX_STEPS and solution.t == 0.0
    assert_own(solution.x, x0)


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
def test_a_step_that_changes_nothing(adjoint):
    graph, leaves = linear_problem()
    leaves["alpha"], leaves["beta"] = 0.0, None
    term, x0 = linear_term(graph, leaves), leaves["x0"]
    x = gf.integrate(term, x0, 1.0, method="uniformisation", adjoint=adjoint).x
    assert_own(x, x0)


@pytest.mark.parametrize("times", [[0.5], [0.0, 1.0]], ids=["one time", "two"])
@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams", "dopri5"])
@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("solve", [gf.odeint, gf.odeint_adjoint])
def test_the_first_state_of_odeint(solve, is_tuple, method, times):
    leaf = torch.randn(3, 2, dtype=F64, requires_grad=True)
    x0, t = leaf * 1, torch.tensor(times, dtype=F64)
    y0 = (x0, torch.ones(2, dtype=F64)) if is_tuple else x0
    f = (lambda t, y: tuple(-part for part in y)) if is_tuple else decay
    more = {} if solve is gf.odeint else {"adjoint_params": ()}
    ys = solve(f, y0, t, method=method, **more)
    first = (ys[0] if is_tuple else ys)[0]
    (dx,) = torch.autograd.grad(first.sum(), leaf)
    assert torch.equal(dx, torch.ones_like(dx))
    assert_own(first.detach(), x0.detach())


@pytest.mark.parametrize("variant", ["l", "nl"])
def test_a_layer_without_time(variant):
    graph = random_graph("loops", 12)
    conv = gf.nn.GRANDConv(4, T=0.0, variant=variant)
    leaf = torch.randn(12, 4, requires_grad=True)
    x = leaf * 1
    y = conv(x, graph)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(dx, torch.ones_like(dx))
    assert_own(y.detach(), x.detach())
