"""Messages of `odeint` and `odeint_adjoint` name what was called, and its arguments."""

import math
import re

import pytest
import torch

import grand_fast as gf
from grand_fast.solvers import AbstractTerm

F64 = torch.float64
T = torch.tensor([0.0, 1.0], dtype=F64)
ONE, PAIR = torch.ones(3, 2, dtype=F64), (torch.ones(3, dtype=F64), torch.ones(2, dtype=F64))


class Returning(AbstractTerm):
    """A term that returns what it is told to."""

    def __init__(self, f):
        self.f = f

    def vf(self, t, x):
        return self.f(x)


def nan(t, y):
    return y * torch.nan


FIELDS = {  # what `func` does wrong: y0, func, error, text
    "float": (ONE, lambda t, y: 1.0, TypeError, "`func` must return a Tensor, got float"),
    "none": (ONE, lambda t, y: None, TypeError, "`func` must return a Tensor, got NoneType"),
    "tuple": (ONE, lambda t, y: (y,), TypeError, "`func` must return a Tensor, got tuple"),
    "shape": (ONE, lambda t, y: y[:2], ValueError,
              "`func` must return f of the shape of `y0`, [3, 2], got [2, 2]"),
    "larger": (ONE, lambda t, y: y.expand(4, 3, 2), ValueError, "[3, 2], got [4, 3, 2]"),
    "flat": (ONE, lambda t, y: y.flatten(), ValueError, "[3, 2], got [6]"),
    "complex": (ONE, lambda t, y: 1j * y, TypeError,
                "`func` must return f like `y0`, torch.float64, got torch.complex128"),
    "device": (ONE, lambda t, y: y.to("meta"), ValueError,
               "`func` must return f where `y0` is, on cpu, got meta"),
    "one of two": (PAIR, lambda t, y: y[:1], TypeError,
                   "`func` must return as many Tensors as `y0` has, 2, got 1"),
    "no tuple": (PAIR, lambda t, y: None, TypeError, "as `y0` has, 2, got NoneType"),
    "scalar of two": (PAIR, lambda t, y: y[0].sum(), TypeError, "as `y0` has, 2, got Tensor"),
    "float of two": (PAIR, lambda t, y: (y[0], 1.0), TypeError, "must return a Tensor, got float"),
    "part": (PAIR, lambda t, y: (y[0], y[0]), ValueError, "of `y0`, [2], got [3]"),
    "exchanged": (PAIR, lambda t, y: (y[1], y[0]), ValueError, "of `y0`, [3], got [2]"),
    "term's type": (ONE, Returning(lambda x: x.float()), ValueError,
                    "`func` must return f like x, torch.float64 [3, 2], got torch.float32 [3, 2]"),
    "term's shape": (ONE, Returning(lambda x: x[0]), ValueError,
                     "`func` must return f like x, torch.float64 [3, 2], got torch.float64 [2]"),
    "term's float": (ONE, Returning(lambda x: 1.0), TypeError,
                     "`func` must return f as a Tensor, got float"),
    "term's device": (ONE, Returning(lambda x: x.to("meta")), ValueError,
                      "`func` must return f where x is, on cpu, got meta"),
}  # fmt: skip


def call(solve, func, y0, t=T, **options):
    more = {} if solve is gf.odeint else {"adjoint_params": ()}
    return solve(func, y0, t, **more, **options)


SOLVES = pytest.mark.parametrize("solve", [gf.odeint, gf.odeint_adjoint])


@SOLVES
@pytest.mark.parametrize("falls", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "implicit_adams"])
@pytest.mark.parametrize("kind", FIELDS)
def test_a_function_that_returns_something_else(kind, method, falls, solve):
    y0, func, error, text = FIELDS[kind]
    t = T.flip(0) if falls else T
    with pytest.raises(error, match=f"^{solve.__name__}: .*{re.escape(text)}"):
        call(solve, func, y0, t, method=method)


ARGUMENTS = {
    "t": (AssertionError, "`t` must be a Tensor", {"t": [0.0, 1.0]}),
    "t integer": (TypeError, "`t` must be floating", {"t": torch.arange(3)}),
    "t order": (AssertionError, "`t` must be strictly", {"t": torch.tensor([0.0, 1.0, 0.5])}),
    "t shape": (AssertionError, "`t` must have shape", {"t": torch.ones(2, 2)}),
    "y0": (AssertionError, "`y0` must be a Tensor or a tuple", {"y0": [ONE]}),
    "y0 integer": (TypeError, "`y0` must be floating", {"y0": torch.ones(2).long()}),
    "y0 part": (AssertionError, "`y0` must be a Tensor or a tuple", {"y0": (ONE, 1.0)}),
    "interp": (ValueError, "`interp` must be linear", {"options": {"interp": "quintic"}}),
    "grids": (ValueError, "`step_size` and `grid_constructor` exclude",
              {"options": {"step_size": 0.1, "grid_constructor": max}}),
    "step_size": (ValueError, "`step_size` must be above 0", {"options": {"step_size": 0.0}}),
    "grid": (AssertionError, "the grid of `grid_constructor` must begin",
             {"options": {"grid_constructor": lambda f, y, t: t + 1}}),
    "max_iters": (ValueError, "`max_iters` must be at least 1",
                  {"method": "implicit_adams", "options": {"max_iters": 0}}),
    "rtol": (AssertionError, "`rtol` must hold one value per tensor", {"y0": PAIR, "rtol": (1.0,)}),
    "atol": (AssertionError, "`atol` must not require",
             {"atol": torch.tensor(1e-3, requires_grad=True)}),
    "an argument": (TypeError, "`options` must not hold rtol", {"options": {"rtol": 1e-3}}),
}  # fmt: skip


@SOLVES
@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_that_cannot_be(case, solve):
    error, text, given = ARGUMENTS[case]
    given = {"y0": ONE, "method": "rk4"} | given
    with pytest.raises(error, match=f"^{solve.__name__}: {re.escape(text)}"):
        call(solve, lambda t, y: y, **given)


@SOLVES
def test_failures(solve):
    name = solve.__name__
    of_integrate = re.compile("integrate|tol_scale|max_steps|max_nfe|semi_implicit")
    for func, options, text in (
        (lambda t, y: y**2, {"method": "dopri5"}, f"underflow in dt at t = 1, in {name}: "),
        (nan, {}, f"non-finite values in state `y` at t = 0, in {name}: "),
        (lambda t, y: -y, {"options": {"max_num_steps": 2, "first_step": 1e-3}},
         f"max_num_steps exceeded at t = [0-9.]*, in {name}: try a larger max_num_steps"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=text) as caught:
            call(solve, func, ONE, 2 * T, **options)
        assert not of_integrate.search(str(caught.value))


def test_a_failure_of_the_second_solve():
    y0 = ONE.clone().requires_grad_()
    ys = gf.odeint_adjoint(
        lambda t, y: -y, y0, T, adjoint_params=(),
        adjoint_options={"max_num_steps": 1, "first_step": 1e-3},
    )  # fmt: skip
    with pytest.raises(AssertionError, match="max_num_steps exceeded.*in odeint_adjoint"):
        ys.sum().backward()


@pytest.mark.parametrize("f", [lambda y: -y.mean(), lambda y: (1 - y).float()])
def test_what_the_adjoint_fits_to_the_state_has_a_gradient(f):
    """A function whose result is of another shape or type than the state."""
    grads = []
    for solve in (gf.odeint, gf.odeint_adjoint):
        y0 = torch.linspace(2, 3, 6, dtype=F64).view(3, 2).requires_grad_()
        ys = call(solve, lambda t, y: f(y), y0, rtol=1e-6, atol=1e-6)
        grads.append(torch.autograd.grad(ys[-1].square().sum(), y0)[0])
    assert float((grads[0] - grads[1]).abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_adams"])
def test_integrate_names_its_own(method):
    for f, error, text in (
        (lambda t, x: 1.0, TypeError, "must return f as a Tensor, got float"),
        (lambda t, x: x[0], ValueError, r"must return f like x, torch.float64 \[3, 2\], got"),
        (lambda t, x: x.to("meta"), ValueError, "must return f where x is, on cpu, got meta"),
    ):
        with pytest.raises(error, match=f"^integrate: `term` {text}"):
            gf.integrate(f, ONE, 1.0, method=method)


@pytest.mark.parametrize("front", [gf.odeint, gf.odeint_adjoint])
@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"rtol": -1.0}, ValueError, "`rtol` must be finite and at least 0, got -1.0"),
        ({"atol": math.nan}, ValueError, "`atol` must be finite and at least 0, got nan"),
        ({"rtol": "a"}, TypeError, "`rtol` must be a float or a Tensor, got a str"),
        ({"options": 3}, TypeError, "`options` must be a dict or None, got int"),
        ({"y0": ()}, AssertionError, "`y0` must be a Tensor or a tuple of them, got an empty"),
    ],
    ids=str,
)
def test_what_no_solve_can_take_is_named(given, error, text, front):
    class Decay(torch.nn.Module):
        def forward(self, t, y):
            return -y

    arguments = {"y0": torch.ones(2), "t": torch.tensor([0.0, 1.0])} | given
    with pytest.raises(error, match=f"{front.__name__}: {text}"):
        front(Decay(), **arguments)
