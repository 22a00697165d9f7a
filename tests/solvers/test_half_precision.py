"""States of float16 and bfloat16: right to what their type resolves, at any tolerance."""

import logging
import math

import pytest
import torch

import grand_fast as gf
from grand_fast.solvers import ContinuousOptions
from grand_fast.solvers.tolerances import default_tolerances
from tests._pairwise import pairwise

F64 = torch.float64
HALF = (torch.float16, torch.bfloat16)
PAIRS = ("dopri5", "bosh3", "adaptive_heun")
ADAMS = ("explicit_adams", "implicit_adams")
METHODS = (*PAIRS, *ADAMS)
# Of a rounding of the state's largest size. Slopes are rounded, and their errors add up over time.
ROUNDINGS = 8
TOO_TIGHT = {"rtol": 1e-7, "atol": 1e-9}


def diffusion():
    generator = torch.Generator().manual_seed(0)
    n = 12
    a = torch.rand(n, n, dtype=F64, generator=generator)
    a = a * (torch.rand(n, n, generator=generator) < 0.4) + torch.eye(n, dtype=F64)
    x = torch.randn(n, 4, dtype=F64, generator=generator)
    return a / a.sum(1, keepdim=True) - torch.eye(n, dtype=F64), x


POINTS = torch.tensor([[1.0], [0.5], [1.5]], dtype=F64)
# The matrix of x' = M x, x(0), and how long
PROBLEMS = {
    "decay": (-torch.eye(3, dtype=F64), POINTS, 2.0),
    "growth": (torch.eye(3, dtype=F64), POINTS, 1.5),
    "rotation": (torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=F64), POINTS[:2], 1.0),
    "diffusion": (*diffusion(), 1.0),
}


class Linear(torch.nn.Module):
    """`x' = M x`, in the type of `M`."""

    def __init__(self, m):
        super().__init__()
        self.m = torch.nn.Parameter(m)

    def forward(self, t, x):
        assert x.dtype == self.m.dtype
        assert not isinstance(t, torch.Tensor) or t.dtype == x.dtype
        return self.m @ x


def solved(front, f, x0, T, method, **options):
    """The state at `T`."""
    if front == "integrate":
        step = {"step_size": 0.1} if method in ADAMS else {}
        solution = gf.integrate(f, x0, T, method=method, **step, **options)
        return solution.check().x
    steps = {"step_size": 0.1, "max_order": 4} if method in ADAMS else {}
    t = torch.tensor([0.0, T])
    return getattr(gf, front)(f, x0, t, method=method, options=steps, **options)[1]


def exact(problem, dtype):
    """The rounded matrix and state; the state at the end, and the gradient of its sum."""
    m, x0, T = PROBLEMS[problem]
    m, x0 = m.to(dtype), x0.to(dtype)
    flow = torch.matrix_exp(T * m.double())
    return m, x0, T, flow @ x0.double(), flow.T @ torch.ones_like(x0, dtype=F64)


def assert_right(got, want, largest, roundings=ROUNDINGS):
    eps = torch.finfo(got.dtype).eps
    assert float((got.double() - want).abs().max()) <= roundings * eps * largest


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "resolves" in r.getMessage()]


@pairwise(
    3,
    method=METHODS,
    front=["odeint", "odeint_adjoint", "integrate"],
    dtype=HALF,
    tolerance=["default", "too tight"],
)
def test_states_and_gradients_are_right(dtype, method, front, tolerance, caplog):
    options = TOO_TIGHT if tolerance == "too tight" else {}
    for problem in PROBLEMS if front == "odeint" and not options else ("rotation", "diffusion"):
        m, x0, T, want, want_dx = exact(problem, dtype)
        x0.requires_grad_()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "grand_fast"):
            x = solved(front, Linear(m), x0, T, method, **options)
        warns = options and method != "explicit_adams"
        assert len(warnings_of(caplog)) == (1 if warns else 0)
        assert x.dtype == dtype
        assert_right(x, want, float(torch.cat([want, x0.detach()]).abs().max()))
        (dx,) = torch.autograd.grad(x.sum(dtype=torch.float32), x0)
        assert dx.dtype == dtype
        assert_right(dx, want_dx, max(want_dx.abs().max().item(), 1.0))


@pytest.mark.parametrize("front", ["odeint", "odeint_adjoint", "integrate"])
@pytest.mark.parametrize("dtype", HALF)
def test_the_warning_names_the_type_and_the_tolerances(dtype, front, caplog):
    least = torch.finfo(dtype).eps / 16
    x0 = torch.full((5,), 2.0, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    with caplog.at_level(logging.WARNING, "grand_fast"):
        solved(front, Linear(-torch.eye(5, dtype=dtype)), x0, 1.0, "bosh3", **TOO_TIGHT)
    assert warnings_of(caplog) == [
        f"{front}: rtol = 1e-07 and atol = 1e-09 are below what {name} resolves of a state of "
        f"2: the solve goes on with rtol = {least:.3g} and atol = {2 * least:.3g}. Use float32 or "
        "float64 for less."
    ]


@pytest.mark.parametrize("dtype", HALF)
def test_the_second_solve_warns_once_for_all_its_times(dtype, caplog):
    f, x0 = Linear(-torch.eye(3, dtype=dtype)), torch.ones(3, dtype=dtype, requires_grad=True)
    t = torch.linspace(0, 1, 5)
    with caplog.at_level(logging.WARNING, "grand_fast"):
        xs = gf.odeint_adjoint(f, x0, t, method="bosh3", **TOO_TIGHT)
        assert len(warnings_of(caplog)) == 1
        xs.sum().backward()
        assert len(warnings_of(caplog)) == 2
        caplog.clear()
        options = ContinuousOptions(method="bosh3", **TOO_TIGHT)
        x = gf.integrate(
            f, x0, 1.0, method="dopri5", adjoint="continuous", adjoint_options=options
        ).x
        x.sum().backward()
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("dtype", HALF)
def test_tolerances_in_reach_are_as_given(dtype, caplog):
    assert default_tolerances(dtype)[0] >= torch.finfo(dtype).eps / 16
    evaluations = []
    for tolerances in ({}, dict(zip(("rtol", "atol"), default_tolerances(dtype), strict=True)),
                       {"rtol": 0.05, "atol": 0.0}, {"rtol": 0.0, "atol": 0.05}):  # fmt: skip
        calls = []
        with caplog.at_level(logging.WARNING, "grand_fast"):
            gf.odeint(
                lambda t, x, calls=calls: (calls.append(t), -x)[1], torch.ones(3, dtype=dtype),
                torch.tensor([0.0, 1.0]), method="adaptive_heun", **tolerances,
            )  # fmt: skip
        evaluations.append(len(calls))
    assert not warnings_of(caplog)
    assert evaluations[0] == evaluations[1] > 2 * max(evaluations[2:])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tolerance", [(1e-8, 1e-3), torch.tensor([1e-3, 1e-8, 1e-3, 1e-3])])
def test_tolerances_of_parts_and_of_elements(tolerance, dtype, caplog):
    is_tuple = isinstance(tolerance, tuple)
    parts = (torch.ones(3, dtype=dtype), torch.ones(2, dtype=dtype))
    y0 = parts if is_tuple else torch.ones(4, dtype=dtype)

    def f(t, y):
        return tuple(-part for part in y) if is_tuple else -y

    with caplog.at_level(logging.WARNING, "grand_fast"):
        found = gf.odeint(f, y0, torch.tensor([2.0, 0.5]), rtol=tolerance, atol=0.0)
    assert len(warnings_of(caplog)) == 1 and "rtol = 1e-08" in warnings_of(caplog)[0]
    for states in found if is_tuple else (found,):
        assert states.dtype == dtype
        assert_right(states[1], torch.full_like(states[1], math.exp(1.5), dtype=F64), math.exp(1.5))


@pytest.mark.parametrize("dtype", HALF)
def test_short_steps_add_up(dtype):
    """A thousandth of the state is less than bfloat16 resolves of it."""
    x0, tau = torch.ones(3, dtype=dtype), 1e-3
    for method in ADAMS:
        x = gf.integrate(lambda t, x: -x, x0, 0.1, method=method, step_size=tau).check().x
        assert_right(x, torch.full((3,), math.exp(-0.1), dtype=F64), 1.0)
    for method in PAIRS:
        x = gf.odeint(lambda t, x: -x, x0, torch.tensor([0.0, 0.1]), method=method,
                      options={"max_step": tau})[1]  # fmt: skip
        assert_right(x, torch.full((3,), math.exp(-0.1), dtype=F64), 1.0)


@pytest.mark.parametrize("size", [3e4, 1e-6], ids=["large", "small"])
@pytest.mark.parametrize("method", PAIRS)
def test_states_whose_squares_leave_the_range_of_float16(method, size):
    x0 = torch.full((4,), size, dtype=torch.float16)
    t = torch.tensor([0.0, 1.0])
    for x in (
        gf.odeint(lambda t, x: -x, x0, t, method=method, atol=0.0)[1],
        gf.integrate(lambda t, x: -x, x0, 1.0, method=method, atol=0.0).check().x,
    ):
        # Of subnormal numbers the least, not a share of their size
        unit = max(float(x0[0]), torch.finfo(torch.float16).tiny)
        assert_right(x, x0.double() * math.exp(-1.0), unit)


@pytest.mark.parametrize("method", METHODS)
def test_whoever_listens_hears_states_of_their_type(method):
    heard = []

    def f(t, y):
        return -y

    f.callback_step = lambda t, y, tau: heard.append(y.dtype)
    solved("odeint", f, torch.ones(3, dtype=torch.float16), 1.0, method)
    with torch.no_grad():
        solved("integrate", f, torch.ones(3, dtype=torch.float16), 1.0, method,
               observe=lambda t, x: heard.append(x.dtype))  # fmt: skip
    assert len(heard) > 2 and set(heard) == {torch.float16}


SOLVES = {
    "direct": {"adjoint": "direct"},
    "checkpoint": {},
    "limited": {"memory_limit": 10**5},
    "continuous": {"adjoint": "continuous"},
    "penalties": {"regularizers": ("kinetic",)},
}


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize(("method", "dtype"), [
    ("dopri5", torch.float16), ("adaptive_heun", torch.bfloat16),
    ("explicit_adams", torch.bfloat16), ("implicit_adams", torch.float16),
])  # fmt: skip
def test_every_way_to_differentiate(dtype, method, solve):
    m, x0, T, want, want_dx = exact("diffusion", dtype)
    f, x0 = Linear(m), x0.requires_grad_()
    step = {"step_size": 0.1} if method in ADAMS else {}
    options = SOLVES[solve]
    solution = gf.integrate(f, x0, T, method=method, times=[0.0, 0.5, T], **step, **options)
    assert solution.check().xs.dtype == solution.x.dtype == dtype
    assert torch.equal(solution.xs[0], x0) and torch.equal(solution.xs[2], solution.x)
    assert_right(solution.x, want, float(x0.detach().abs().max()))
    assert all(p.dtype == dtype for p in solution.penalties.values())
    dx, dm = torch.autograd.grad(solution.x.sum(dtype=torch.float32), (x0, f.m))
    assert dx.dtype == dm.dtype == dtype
    assert_right(dx, want_dx, float(want_dx.abs().max()))
    # By the entries of the matrix, through float64
    m = m.double().requires_grad_()
    whole = torch.matrix_exp(T * m) @ x0.detach().double()
    (want_dm,) = torch.autograd.grad(whole.sum(), m)
    assert_right(dm, want_dm, float(want_dm.abs().max()), 2 * ROUNDINGS)


@pytest.mark.parametrize("front", ["integrate", "odeint"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_many_short_steps_of_a_fixed_method_add_up(method, front):
    """Each of them alone changes the state by less than its type resolves."""
    x0, step = torch.ones(2, dtype=torch.float16), 2e-4
    if front == "integrate":
        x = gf.integrate(lambda t, y: -y, x0, 0.25, method=method, step_size=step).x
    else:
        options = {"step_size": step}
        x = gf.odeint(
            lambda t, y: -y, x0, torch.tensor([0.0, 0.25]), method=method, options=options
        )[-1]
    assert x.dtype == torch.float16
    assert (x.double() - math.exp(-0.25)).abs().max() < 2 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_few_steps_of_a_fixed_method_stay_in_the_state_s_type(dtype):
    """There a term's fused step is worth more."""
    x0, seen = torch.ones(2, dtype=dtype), []

    class Fused(gf.solvers.AbstractTerm):
        def vf(self, t, x):
            return -x

        def axpy(self, t, x, base, tau):
            seen.append(x.dtype)
            return base.evaluate() - tau * x

    gf.integrate(Fused(), x0, 1.0, method="euler", step_size=0.1)
    assert seen == 10 * [dtype]
