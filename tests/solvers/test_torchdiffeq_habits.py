"""What torchdiffeq's users do: options that a method does not know, and a patched package."""

import subprocess
import sys
import warnings

import pytest
import torch
import torchdiffeq
from torchdiffeq._impl.odeint import SOLVERS

import grand_fast as gf
from grand_fast.solvers.torchdiffeq import package
from grand_fast.testing import assert_close

F64 = torch.float64
ON_A_GRID = ("euler", "midpoint", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
BY_ERROR = ("dopri5", "bosh3", "adaptive_heun")
# A value of each option that torchdiffeq has, which changes no answer
VALUES = {
    "step_size": 0.1, "grid_constructor": None, "interp": "linear", "perturb": False,
    "max_order": 5, "max_iters": 4, "implicit": True, "norm": lambda x: x.square().mean().sqrt(),
    "first_step": 0.01, "min_step": 0.0, "max_step": 0.2, "step_t": None, "jump_t": None,
    "safety": 0.9, "ifactor": 10.0, "dfactor": 0.2, "max_num_steps": 1000, "dtype": F64,
    "solver": "LSODA", "sidestep": 1,
}  # fmt: skip
# Of methods that do not know them, values that change much where they are known
FOREIGN = {"perturb": True, "max_order": 2, "implicit": False, "dtype": torch.float32,
           "step_t": torch.tensor([0.5]), "jump_t": torch.tensor([0.5])}  # fmt: skip
OF_FIXED_STEPS = ("step_size", "grid_constructor", "interp", "perturb")


def is_foreign(option, method):
    if option in ("max_order", "max_iters", "implicit"):
        return "adams" not in method
    return (option in OF_FIXED_STEPS) == (method in BY_ERROR)


def field(t, y):
    return -y * torch.cos(t)


@pytest.fixture
def ours_alone(monkeypatch):
    """No call is handed to torchdiffeq."""

    def refuse():
        raise AssertionError("handed to torchdiffeq")

    monkeypatch.setattr(package, "solvers", refuse)


def told(solve, method, options):
    """The answer, and the warnings."""
    y0, t = torch.ones(3, dtype=F64), torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ys = solve(field, y0, t, method=method, options=options, rtol=1e-5, atol=1e-6)
    return ys, [str(w.message) for w in caught if "did not" not in str(w.message)]


@pytest.mark.parametrize("option", VALUES)
@pytest.mark.parametrize("method", [*ON_A_GRID, *BY_ERROR])
def test_each_method_knows_the_options_that_torchdiffeqs_knows(method, option, ours_alone):
    options = {"step_size": 0.1} if method in ON_A_GRID else {}
    if "adams" in method:
        options["max_order"] = 4
    options[option] = VALUES[option]
    if option in FOREIGN and is_foreign(option, method):
        options[option] = FOREIGN[option]
    if method == "explicit_adams" and option == "implicit":
        for solve in (gf.odeint, torchdiffeq.odeint):
            with pytest.raises(TypeError, match="implicit"):
                told(solve, method, options)
        return
    got, said = told(gf.odeint, method, options)
    want, expected = told(torchdiffeq.odeint, method, options)
    assert said == expected
    if expected:
        assert expected[0].startswith(f"{SOLVERS[method].__name__}: Unexpected arguments")
    assert_close("states", got, want, tolerance=1e-10)


@pytest.mark.parametrize("method", [*ON_A_GRID, *BY_ERROR])
def test_unknown_options_are_all_named_and_change_nothing(method, ours_alone):
    options = {"step_size": 0.1, "max_order": 4} if "adams" in method else {}
    plain, _ = told(gf.odeint, method, options)
    got, said = told(gf.odeint, method, options | {"sidestep": 1, "tableau": [2]})
    assert len(said) == 1 and "{'sidestep': 1, 'tableau': [2]}" in said[0]
    assert torch.equal(got, plain)


def test_the_warning_is_at_the_callers_line():
    with pytest.warns(UserWarning, match="Dopri5Solver: Unexpected") as caught:
        gf.odeint(field, torch.ones(2), torch.tensor([0.0, 1.0]), options={"step_size": 0.1})
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["func", "y0", "rtol", "atol"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_an_argument_among_the_options(method, name):
    for solve in (gf.odeint, torchdiffeq.odeint):
        with pytest.raises(TypeError, match=name):
            told(solve, method, {name: 1e-3})


@pytest.mark.filterwarnings("ignore:.*did not")  # corrections that do not settle
def test_the_explicit_half_of_implicit_adams(ours_alone):
    for method in ("implicit_adams", "fixed_adams"):
        options = {"step_size": 0.05, "max_order": 5}
        got, _ = told(gf.odeint, method, options | {"implicit": False})
        want, _ = told(torchdiffeq.odeint, method, options | {"implicit": False})
        explicit, _ = told(gf.odeint, "explicit_adams", options)
        assert torch.equal(got, explicit)
        assert_close("states", got, want, tolerance=1e-12)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_options_of_both_solves_of_the_adjoint(method, ours_alone):
    y0 = torch.ones(3, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    grads = []
    for solve in (gf.odeint_adjoint, torchdiffeq.odeint_adjoint):
        with pytest.warns(UserWarning, match="Unexpected arguments") as caught:
            ys = solve(
                field, y0, t, method=method, options={"sidestep": 1},
                adjoint_options={"tableau": 2}, adjoint_params=(),
            )  # fmt: skip
            grads.append(torch.autograd.grad(ys[-1].sum(), y0)[0])
        assert [("sidestep" in str(w.message), "tableau" in str(w.message)) for w in caught] == [
            (True, False), (False, True)]  # fmt: skip
    assert_close("gradient", *grads, tolerance=1e-9)


PATCHED = """
import math, sys
import torch, torchdiffeq
import grand_fast as gf

torchdiffeq.odeint, torchdiffeq.odeint_adjoint = gf.odeint, gf.odeint_adjoint
torchdiffeq._impl.odeint, torchdiffeq._impl.odeint_adjoint = gf.odeint, gf.odeint_adjoint
torchdiffeq.odeint_event, torchdiffeq.odeint_dense = gf.odeint_event, gf.odeint_dense
f = lambda t, y: -y
y0 = torch.ones(2, dtype=torch.float64)
t = torch.tensor([0.0, 1.0], dtype=torch.float64)
sys.setrecursionlimit(400)
calls = [
    {}, {"method": "dopri8"}, {"method": "fehlberg2"},
    {"method": "dopri5", "options": {"step_t": t[1:] / 2}},
    {"method": "euler", "options": {"perturb": True, "step_size": 1e-3}},
]
more = {}
for solve in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint):
    assert solve.__module__.startswith("grand_fast")
    for call in calls:
        y = solve(f, y0.requires_grad_(), t, **call, **more)[-1]
        assert abs(float(y[0]) - math.exp(-1)) < 1e-3, call
        (dy,) = torch.autograd.grad(y.sum(), y0)
        assert abs(float(dy[0]) - math.exp(-1)) < 1e-3, call
    z = solve(lambda t, y: 1j * y, y0.to(torch.complex128), t, **more)[-1]
    assert abs(complex(z[0]) - complex(math.cos(1), math.sin(1))) < 1e-5
    when, _ = solve(f, y0.detach(), t, event_fn=lambda t, y: y[0] - 0.5, **more)
    assert abs(float(when) - math.log(2)) < 1e-5
    times = t.clone().requires_grad_()
    (dt,) = torch.autograd.grad(solve(f, y0.detach(), times, **more)[-1].sum(), times)
    assert abs(float(dt[1]) + 2 * math.exp(-1)) < 1e-5
    when, _ = torchdiffeq.odeint_event(
        f, y0.detach(), t[0], event_fn=lambda t, y: y[0] - 0.5, odeint_interface=solve, **more
    )
    assert abs(float(when) - math.log(2)) < 1e-5
    more = {"adjoint_params": ()}
for start in (y0.detach(), y0.detach() + 0j):
    assert abs(torchdiffeq.odeint_dense(f, start, *t)(t[1] / 2)[0] - math.exp(-0.5)) < 1e-5
print("fine")
"""


def test_a_package_whose_functions_are_ours():
    """In a process of its own, where torchdiffeq was not called before."""
    ran = subprocess.run([sys.executable, "-c", PATCHED], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip() == "fine", ran.stderr
