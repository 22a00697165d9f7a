"""`gf.odeint` against torchdiffeq: the same calls, the same answers."""

import math

import pytest
import torch
import torchdiffeq

import grand_fast as gf
from grand_fast.solvers import AbstractTerm
from grand_fast.testing import assert_close

F64 = torch.float64
FIXED = ("euler", "midpoint", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun")
TIMES = {
    "rising": [0.0, 0.3, 0.45, 1.1],
    "falling": [1.0, 0.35, -0.5],
    "two": [0.5, 1.5],
    "one": [0.5],
}


class Field:
    """A nonlinear diffusion that depends on time and counts its evaluations."""

    def __init__(self, n=10):
        generator = torch.Generator().manual_seed(n)
        weights = torch.rand(n, n, dtype=F64, generator=generator)
        self.a = weights / weights.sum(1, keepdim=True) - torch.eye(n, dtype=F64)
        self.nfe = 0

    def __call__(self, t, x):
        assert isinstance(t, torch.Tensor) and t.shape == () and t.dtype == x.dtype
        self.nfe += 1
        return torch.tanh(self.a.to(x.dtype) @ x) * torch.cos(t)


def both(y0, t, make=Field, **options):
    """The answers of both, and how often they evaluated."""
    ours, theirs = make(), make()
    got = gf.odeint(ours, y0, t, **options)
    want = torchdiffeq.odeint(theirs, y0, t, **options)
    return got, want, (getattr(ours, "nfe", None), getattr(theirs, "nfe", None))


def assert_ulps(got, want, ulps):
    assert got.shape == want.shape and got.dtype == want.dtype
    ulp = torch.finfo(want.dtype).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= ulps * ulp


@pytest.mark.filterwarnings("ignore:.*did not")  # corrections that do not settle
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("step_size", [None, 0.1, 0.07])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps(method, step_size, times):
    y0 = torch.randn(10, 3, dtype=F64)
    t = torch.tensor(TIMES[times], dtype=F64)
    options = {} if step_size is None else {"step_size": step_size}
    if "adams" in method:
        options["max_order"] = 5  # higher ones are unstable at these steps
    got, want, nfe = both(y0, t, method=method, options=options)
    steps = len(t) if step_size is None else math.ceil(float(t[-1] - t[0]) / step_size) or 1
    assert_ulps(got, want, 16 * abs(steps))
    assert nfe[0] == nfe[1]


@pytest.mark.filterwarnings("ignore:.*did not")  # corrections that do not settle
@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams"])
@pytest.mark.parametrize("times", TIMES)
def test_cubic_interpolation(method, times):
    y0 = torch.randn(10, 3, dtype=F64)
    t = torch.tensor(TIMES[times], dtype=F64)
    options = {"step_size": 0.12, "interp": "cubic"}
    got, want, _ = both(y0, t, method=method, options=options)
    assert_ulps(got, want, 16 * 14)
    if method == "rk4" and len(t) > 2:  # order 4 between the steps, too
        linear = gf.odeint(Field(), y0, t, method=method, options={"step_size": 0.12})
        exact = gf.odeint(Field(), y0, t, rtol=1e-12, atol=1e-12)
        assert float((got - exact).abs().max()) < float((linear - exact).abs().max()) / 100


@pytest.mark.parametrize("times", TIMES)
def test_grid_constructor(times):
    t = torch.tensor(TIMES[times], dtype=F64)

    def grid(func, y0, t):
        assert func(t[0], y0).shape == y0.shape
        fine = torch.linspace(float(t[0]), float(t[-1]), 8, dtype=t.dtype)
        fine[-1] = t[-1]
        return fine if len(t) > 1 else t

    y0 = torch.randn(10, 3, dtype=F64)
    got, want, _ = both(y0, t, method="rk4", options={"grid_constructor": grid})
    assert_ulps(got, want, 16 * 7)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_adaptive_steps_are_the_same(method, times, tolerance):
    heard = {}

    class Listening(Field):
        def __init__(self):
            super().__init__()
            self.steps = []
            heard[len(heard)] = self.steps

        def callback_accept_step(self, t0, y0, dt):
            self.steps.append(("accept", float(t0), float(dt)))

        def callback_reject_step(self, t0, y0, dt):
            self.steps.append(("reject", float(t0), float(dt)))

    y0 = torch.randn(10, 3, dtype=F64)
    t = torch.tensor(TIMES[times], dtype=F64)
    options = {"rtol": tolerance, "atol": tolerance, "method": method}
    got, want, nfe = both(y0, t, Listening, **options)
    assert nfe[0] == nfe[1]
    assert [s[0] for s in heard[0]] == [s[0] for s in heard[1]]
    for ours, theirs in zip(heard[0], heard[1], strict=True):
        assert ours[1:] == pytest.approx(theirs[1:], rel=1e-6)
    assert_close("states", got, want, tolerance=1e-9)


def test_adaptive_parity_where_steps_are_rejected():
    class Pulse(Field):
        def __call__(self, t, x):
            return super().__call__(t, x) + 40 * torch.exp(-(((t - 0.6) / 0.02) ** 2))

    class Counting(Pulse):
        rejected = 0

        def callback_reject_step(self, t0, y0, dt):
            Counting.rejected += 1

    y0 = torch.randn(10, 3, dtype=F64)
    t = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    got, want, nfe = both(y0, t, Counting, options={"first_step": 0.1}, method="dopri5")
    assert Counting.rejected >= 4 and Counting.rejected % 2 == 0
    assert nfe[0] == nfe[1]
    assert_ulps(got, want, 16 * nfe[0] / 6)


CONTROL = {
    "first_step": {"first_step": 0.01},
    "first_step tensor": {"first_step": torch.tensor(0.01)},
    "min_step": {"min_step": 0.6},
    "max_step": {"max_step": 0.05},
    "safety": {"safety": 0.2},
    "factors": {"ifactor": 1.5, "dfactor": 0.7},
    "max_num_steps": {"max_num_steps": 1000},
    "dtype": {"dtype": torch.float64},
    "norm": {"norm": lambda x: x.abs().max()},
}


@pytest.mark.parametrize("option", CONTROL)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_options_of_the_step_control(option, method):
    y0 = torch.randn(10, 3, dtype=F64)
    t = torch.tensor([0.0, 0.7, 1.3], dtype=F64)
    plain = both(y0, t, method=method, rtol=1e-5, atol=1e-6)[2]
    got, want, nfe = both(y0, t, method=method, options=CONTROL[option], rtol=1e-5, atol=1e-6)
    assert nfe[0] == nfe[1]
    assert_close("states", got, want, tolerance=1e-10)
    if option not in ("max_num_steps", "dtype"):
        assert nfe != plain


def pair_field(t, state):
    position, velocity, rest = state
    return velocity, -position.sin() * (1 + t), -rest


@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
@pytest.mark.parametrize("times", ["rising", "falling"])
def test_tuple_states(method, times):
    y0 = (torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64), torch.ones((), dtype=F64))
    t = torch.tensor(TIMES[times], dtype=F64)
    options = {"step_size": 0.1} if method in FIXED else {}
    if "adams" in method:
        options["max_order"] = 4
    tolerances = {"rtol": 1e-5, "atol": 1e-6}
    got, want, _ = both(y0, t, lambda: pair_field, method=method, options=options, **tolerances)
    assert isinstance(got, tuple) and len(got) == 3
    for ours, theirs in zip(got, want, strict=True):
        assert_close("state", ours, theirs, tolerance=1e-9)


@pytest.mark.parametrize("tolerance", [(1e-3, 1e-8, 1e-5), [1e-3, 1e-8, 1e-5],
                                       (torch.tensor(1e-3), 1e-8, torch.tensor(1e-5))])  # fmt: skip
def test_tolerances_of_each_tensor(tolerance):
    y0 = (torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64), torch.ones((), dtype=F64))
    t = torch.tensor([0.0, 2.0], dtype=F64)
    calls = [0, 0]

    def make(which):
        def field(t, state):
            calls[which] += 1
            return pair_field(t, state)

        return field

    got = gf.odeint(make(0), y0, t, rtol=tolerance, atol=tolerance)
    want = torchdiffeq.odeint(make(1), y0, t, rtol=tolerance, atol=tolerance)
    assert calls[0] == calls[1]
    for ours, theirs in zip(got, want, strict=True):
        assert_close("state", ours, theirs, tolerance=1e-12)


def test_tolerances_of_each_element_and_norm_of_a_tuple():
    y0 = torch.randn(10, 3, dtype=F64)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    rtol = torch.logspace(-7, -3, 3, dtype=F64)
    got, want, nfe = both(y0, t, rtol=rtol, atol=1e-6)
    assert nfe[0] == nfe[1]
    assert_close("states", got, want, tolerance=1e-12)

    pair = (y0, y0[:2])
    seen = []

    def norm(state):
        seen.append(len(state))
        return state[0].abs().max()

    field = lambda t, s: (-s[0] * t.cos(), s[1])  # noqa: E731
    got, want, _ = both(pair, t, lambda: field, options={"norm": norm}, method="dopri5")
    assert_close("state", got[1], want[1], tolerance=1e-12)
    assert set(seen) == {2}


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("times", ["rising", "falling"])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_callbacks_hear_the_callers_times_and_states(method, times, is_tuple):
    heard = {gf.odeint: [], torchdiffeq.odeint: []}
    t = torch.tensor(TIMES[times], dtype=F64)
    for solve, events in heard.items():

        class Listening(torch.nn.Module):
            def forward(self, t, y):
                return tuple(-part for part in y) if is_tuple else -y

            def callback_step(self, t0, y0, dt, events=events):
                events.append((t0, y0, dt))

        y0 = torch.ones(2, dtype=F64)
        options = {"step_size": 0.2} if method == "rk4" else {"first_step": 0.1}
        solve(Listening(), (y0, y0) if is_tuple else y0, t, method=method, options=options)
    ours, theirs = heard.values()
    assert len(ours) == len(theirs) > 3
    for (t0, y0, dt), (t1, y1, du) in zip(ours, theirs, strict=True):
        assert t0.dtype == t1.dtype and t0.shape == t1.shape == dt.shape == ()
        assert float(t0) == pytest.approx(float(t1)) and float(dt) == pytest.approx(float(du))
        assert type(y0) is type(y1)
        for a, b in zip(y0, y1, strict=True):
            assert_close("state", a, b, tolerance=1e-10)


def test_a_method_says_which_callbacks_it_does_not_support():
    def f(t, y):
        return -y

    f.callback_accept_step = lambda *args: None
    t = torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match="'rk4' does not support callbacks.*accept"):
        gf.odeint(f, torch.ones(2), t, method="rk4")


@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
@pytest.mark.parametrize("times", ["rising", "falling"])
def test_gradients(method, times):
    y0 = torch.randn(4, 2, dtype=F64, requires_grad=True)
    w = torch.randn(4, 4, dtype=F64, requires_grad=True)
    t = torch.tensor(TIMES[times], dtype=F64)
    options = {"step_size": 0.1} if method in FIXED else {"first_step": 0.02}
    if "adams" in method:
        options["max_order"] = 4
    grads = []
    for solve in (gf.odeint, torchdiffeq.odeint):
        f = lambda t, x: torch.tanh(w @ x) * t.cos() - x  # noqa: E731
        ys = solve(f, y0, t, method=method, options=options, rtol=1e-5, atol=1e-5)
        grads.append(torch.autograd.grad(ys.square().sum(), (y0, w)))
    for ours, theirs in zip(*grads, strict=True):
        assert_close("gradient", ours, theirs, tolerance=1e-10)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("t_type", [torch.float32, F64])
@pytest.mark.parametrize("y_type", [torch.float32, F64])
def test_types(method, t_type, y_type):
    y0 = torch.randn(10, 3).to(y_type)
    t = torch.tensor([0.0, 0.3, 1.1], dtype=t_type)
    options = {"step_size": 0.1} if method == "rk4" else {}
    got, want, _ = both(y0, t, method=method, options=options, rtol=1e-5, atol=1e-6)
    assert got.dtype == y_type
    narrow = torch.float32 in (t_type, y_type)
    assert_close("states", got, want, tolerance=3e-6 if narrow else 1e-14)


def test_whatever_a_function_returns_is_fitted_to_the_state():
    y0, t = torch.zeros(2, 3), torch.tensor([0.0, 1.0])
    for method, f in (
        ("euler", lambda t, y: torch.ones(())),
        ("euler", lambda t, y: torch.ones(3)),
        ("rk4", lambda t, y: 1 - y.double()),
        ("dopri5", lambda t, y: 1 - y.double()),
    ):
        got = gf.odeint(f, y0, t, method=method, rtol=1e-4, atol=1e-4)
        want = torchdiffeq.odeint(f, y0, t, method=method, rtol=1e-4, atol=1e-4)
        assert got.dtype == y0.dtype
        assert_close("states", got, want, tolerance=1e-4)  # f is of float64 there between steps


def test_scalar_state():
    t = torch.tensor([0.0, 1.0], dtype=F64)
    got = gf.odeint(lambda t, y: -y, torch.ones((), dtype=F64), t)
    assert got.shape == (2,)
    assert float(got[1]) == pytest.approx(math.exp(-1), abs=1e-7)


@pytest.mark.parametrize("times", ["rising", "falling"])
@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams"])
def test_the_fused_step_of_a_term_is_used(method, times):
    class Fused(AbstractTerm):
        steps = 0

        def vf(self, t, x):
            assert isinstance(t, float)
            return -(1 + t) * x

        def axpy(self, t, x, base, tau):
            assert isinstance(t, float)
            self.steps += 1
            return base.evaluate() - tau * (1 + t) * x

    term = Fused()
    y0 = torch.ones(3, dtype=F64)
    t = torch.tensor(TIMES[times], dtype=F64)
    options = {"method": method, "options": {"step_size": 0.05}}
    got = gf.odeint(term, y0, t, **options)
    want = gf.odeint(lambda t, x: -(1 + t) * x, y0, t, **options)
    assert term.steps >= 10
    assert_close("states", got, want, tolerance=1e-13)


def test_a_term_may_go_wherever_a_function_does():
    class Decay(AbstractTerm):
        def vf(self, t, x):
            return -x

    y0, t = torch.ones(3, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    got = gf.odeint(Decay(), y0, t, method="dopri8")  # which torchdiffeq answers
    assert_close("x(1)", got[1], math.exp(-1) * y0, tolerance=1e-4)


@pytest.mark.filterwarnings("ignore:The following arguments have no effect")  # SciPy
def test_what_our_solvers_do_not_know_is_answered_by_torchdiffeq():
    y0 = torch.randn(10, 3, dtype=F64)
    t = torch.tensor([0.0, 0.7, 1.3], dtype=F64)
    calls = [
        {"method": "dopri8"}, {"method": "heun3", "options": {"step_size": 0.1}},
        {"method": "fehlberg2"},
        {"method": "scipy_solver", "options": {"solver": "RK45"}},
        {"method": "dopri5", "options": {"step_t": torch.tensor([0.5], dtype=F64)}},
        {"method": "dopri5", "options": {"jump_t": torch.tensor([0.5], dtype=F64)}},
        {"method": "euler", "options": {"perturb": True}},
        {"method": "dopri5", "options": {"dtype": torch.float32}},
    ]  # fmt: skip
    for call in calls:
        got, want, nfe = both(y0, t, **call)
        assert nfe[0] == nfe[1]
        assert torch.equal(got, want)
    with pytest.warns(UserWarning, match="Unexpected arguments"):
        gf.odeint(Field(), y0, t, method="rk4", options={"sidestep": 1})
    with pytest.warns(UserWarning, match="reduces to `rk4`"):
        gf.odeint(Field(), y0, t, method="explicit_adams", options={"max_order": 3})


def test_gradient_by_the_times():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64, requires_grad=True)
    y0 = torch.ones(2, dtype=F64)
    ys = gf.odeint(lambda t, y: -y, y0, t)
    (dt,) = torch.autograd.grad(ys[-1].sum(), t)
    assert_close("dt", dt[-1], -2 * torch.exp(torch.tensor(-1.0, dtype=F64)), tolerance=1e-6)


def test_complex_states():
    y0 = torch.ones(2, dtype=torch.complex128)
    t = torch.tensor([0.0, math.pi / 2], dtype=F64)
    ys = gf.odeint(lambda t, y: 1j * y, y0, t)
    assert_close("y", torch.view_as_real(ys[-1]), torch.view_as_real(1j * y0), tolerance=1e-7)


def test_failures_raise_as_torchdiffeqs_do():
    y0, t = torch.ones(2, dtype=F64), torch.tensor([0.0, 2.0], dtype=F64)
    failures = {
        "underflow in dt": (lambda t, y: y**2, {}),  # y = 1 / (1 − t)
        "max_num_steps exceeded": (lambda t, y: -y, {"max_num_steps": 2, "first_step": 1e-3}),
    }
    for text, (f, options) in failures.items():
        for solve in (gf.odeint, torchdiffeq.odeint):
            with pytest.raises(AssertionError, match=text):
                solve(f, y0, t, method="dopri5", options=options)
    with pytest.raises(AssertionError, match="at t = 0, in odeint.*not finite"):
        gf.odeint(lambda t, y: y * math.nan, y0, t)


def test_a_state_that_leaves_the_range_at_the_shortest_step_is_a_failure():
    y0, t = torch.ones(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    for solve in (gf.odeint, torchdiffeq.odeint):
        with pytest.raises(AssertionError, match="non-finite values in state"):
            solve(lambda t, y: y * math.nan, y0, t, options={"min_step": 0.1, "first_step": 0.2})


def test_the_limit_of_steps_counts_from_each_output_time():
    y0, t = torch.ones(2, dtype=F64), torch.linspace(0, 2, 5, dtype=F64)
    options = {"max_step": 0.1, "max_num_steps": 6, "first_step": 0.1}
    got, want, _ = both(y0, t, lambda: lambda t, y: -y, method="dopri5", options=options)
    assert_close("states", got, want, tolerance=1e-12)


BAD = {
    "method": (ValueError, "rk9", {"method": "rk9"}),
    "t type": (AssertionError, "`t` must be a Tensor, got list", {"t": [0.0, 1.0]}),
    "t integer": (TypeError, "`t` must be floating, got torch.int64", {"t": torch.arange(3)}),
    "t shape": (AssertionError, r"`t` must have shape", {"t": torch.ones(2, 2)}),
    "t order": (AssertionError, "strictly", {"t": torch.tensor([0.0, 1.0, 0.5])}),
    "t repeats": (AssertionError, "strictly", {"t": torch.tensor([0.0, 1.0, 1.0])}),
    "y0 list": (AssertionError, "`y0` must be a Tensor or a tuple", {"y0": [torch.ones(2)]}),
    "y0 integer": (TypeError, "`y0` must be floating", {"y0": torch.ones(2).long()}),
    "interp": (ValueError, "`interp` must be linear or cubic",
               {"method": "rk4", "options": {"interp": "quintic"}}),
    "two grids": (ValueError, "exclude each other",
                  {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": max}}),
    "grid": (AssertionError, r"begin at t\[0\]",
             {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t + 1}}),
    "rtol length": (AssertionError, "`rtol` must hold one value per tensor",
                    {"y0": (torch.ones(2), torch.ones(2)), "rtol": (1e-3,)}),
    "rtol gradient": (AssertionError, "`rtol` must not require",
                      {"rtol": torch.tensor(1e-3, requires_grad=True)}),
    "func": (TypeError, "`func` must return a Tensor, got float", {"func": lambda t, y: 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, text, options = BAD[case]
    call = {"func": lambda t, y: y, "y0": torch.ones(2), "t": torch.tensor([0.0, 1.0]), **options}
    with pytest.raises(error, match=text):
        gf.odeint(**call)
