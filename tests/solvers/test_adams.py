"""The multistep methods: coefficients, order, history, and torchdiffeq's climbing form."""

import math
from fractions import Fraction

import pytest
import torch
import torchdiffeq

import grand_fast as gf
from grand_fast.solvers import AbstractTerm, ExplicitAdams, ImplicitAdams
from grand_fast.solvers.methods.adams import bashforth, moulton
from grand_fast.testing import assert_close

F64 = torch.float64
METHODS = ("explicit_adams", "implicit_adams")


def diffusion_matrix(n=12):
    weights = torch.rand(n, n, dtype=F64)
    return weights / weights.sum(1, keepdim=True) - torch.eye(n, dtype=F64)


def test_coefficients_of_order_4_are_the_textbook_ones():
    def over(denominator, *numerators):
        return tuple(float(Fraction(n, denominator)) for n in numerators)

    assert bashforth(4) == over(24, 55, -59, 37, -9)
    assert moulton(4) == over(24, 9, 19, -5, 1)


@pytest.mark.parametrize("order", range(1, 13))
@pytest.mark.parametrize(("weights", "newest"), [(bashforth, 0), (moulton, 1)])
def test_coefficients_integrate_polynomials_exactly(weights, newest, order):
    """`∫_0^1 s^p ds = Σ_i β_i s_i^p` for each p below the order."""
    for power in range(order):
        total = sum(w * (newest - i) ** power for i, w in enumerate(weights(order)))
        size = sum(abs(w * (newest - i) ** power) for i, w in enumerate(weights(order)))
        assert abs(total - 1 / (power + 1)) <= 1e-14 * size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", ["linear", "nonlinear", "of time"])
def test_order_4(method, field):
    a = diffusion_matrix()
    x0 = torch.randn(12, 3, dtype=F64)
    f = {
        "linear": lambda t, x: a @ x,
        "nonlinear": lambda t, x: torch.tanh(a @ x * x.square()),
        "of time": lambda t, x: math.cos(t) * (a @ x),
    }[field]
    T = 2.0
    tight = {"rtol": 1e-13, "atol": 1e-13}
    want = gf.integrate(f, x0, T, method="dopri5", **tight).x
    logs, errors = [], []
    for n in (20, 40, 80, 160):
        # The default tolerance of the corrections would show in the last digits.
        solver = (
            ExplicitAdams() if method == "explicit_adams" else ImplicitAdams(max_iters=9, **tight)
        )
        got = gf.integrate(f, x0, T, method=solver, step_size=T / n).x
        logs.append(math.log(n))
        errors.append(math.log(float((got - want).norm())))
    mean_l, mean_e = sum(logs) / 4, sum(errors) / 4
    slope = sum((p - mean_l) * (q - mean_e) for p, q in zip(logs, errors, strict=True))
    slope /= sum((p - mean_l) ** 2 for p in logs)
    assert abs(-slope - 4) < 0.2


@pytest.mark.parametrize("method", METHODS)
def test_a_last_step_that_is_cut_keeps_the_order(method):
    x0 = torch.ones(1, dtype=F64)
    errors = []
    for h in (0.1, 0.05):
        T = 20.4 * h  # the last step is 0.4 of the others
        got = gf.integrate(lambda t, x: -x, x0, T, method=method, step_size=h).x
        errors.append(abs(float(got) - math.exp(-T)) / math.exp(-T))
    assert errors[0] < 1e-4
    assert errors[1] < errors[0] / 12


def test_each_step_evaluates_once():
    x0 = torch.ones(4, dtype=F64)
    steps = 10
    stats = gf.integrate(lambda t, x: -x, x0, 1.0, method="explicit_adams", step_size=0.1).stats
    assert stats == gf.Stats(nfe=3 * 4 + (steps - 3), accepted=steps, rejected=0)
    # A correction is one more; a tolerance that nothing misses asks for one correction.
    solver = ImplicitAdams(rtol=1.0)
    stats = gf.integrate(lambda t, x: -x, x0, 1.0, method=solver, step_size=0.1).stats
    assert stats.nfe == 3 * 4 + 2 * (steps - 3)


@pytest.mark.parametrize("iters", [1, 2, 3])
def test_corrections_stop_at_the_tolerance_or_the_limit(iters):
    x0 = torch.ones(4, dtype=F64)

    def nfe(**options):
        solver = ImplicitAdams(**options)
        return gf.integrate(lambda t, x: -x, x0, 1.0, method=solver, step_size=0.1).stats.nfe

    assert nfe(max_iters=iters, rtol=0.0, atol=0.0) == 3 * 4 + (1 + iters) * 7
    # A correction is a contraction by 0.0375 here: another digit costs less than one more each.
    assert nfe(max_iters=50, rtol=1e-4) < nfe(max_iters=50, rtol=1e-8) < 12 + 12 * 7


def test_the_corrector_uses_the_fused_step():
    class Fused(AbstractTerm):
        slopes, steps = 0, 0

        def vf(self, t, x):
            self.slopes += 1
            return -x

        def axpy(self, t, x, base, tau):
            self.steps += 1
            return base.evaluate() - tau * x

    term = Fused()
    solver = ImplicitAdams(max_iters=2, rtol=0.0, atol=0.0)
    x0 = torch.ones(3, dtype=F64)
    got = gf.integrate(term, x0, 1.0, method=solver, step_size=0.1).x
    assert (term.slopes, term.steps) == (10, 3 * 3 + 2 * 7)
    want = gf.integrate(lambda t, x: -x, x0, 1.0, method=solver, step_size=0.1).x
    assert_close("x(T)", got, want, tolerance=1e-15)


def test_the_history_carries_gradients_and_what_ends_corrections_does_not():
    a = diffusion_matrix(5).requires_grad_()
    x0 = torch.randn(5, 2, dtype=F64, requires_grad=True)
    for solver in (ExplicitAdams(), ImplicitAdams(), ExplicitAdams(max_order=6),
                   ImplicitAdams(max_order=6)):  # fmt: skip

        def solve(a, x0, solver=solver):
            f = lambda t, x: torch.tanh(a @ x)  # noqa: E731
            return gf.integrate(f, x0, 0.7, method=solver, step_size=0.1).x

        assert torch.autograd.gradcheck(solve, (a, x0))


@pytest.mark.parametrize("max_order", [None, 4, 7, 12])
@pytest.mark.parametrize("make", [ExplicitAdams, ImplicitAdams])
def test_checkpoint_runs_the_same_steps_again(make, max_order):
    a = diffusion_matrix(6).requires_grad_()
    x0 = torch.randn(6, 2, dtype=F64, requires_grad=True)
    grads, counts = [], []
    for adjoint in ("direct", "checkpoint"):
        calls = 0

        def f(t, x):
            nonlocal calls
            calls += 1
            return torch.tanh(a @ x)

        solution = gf.integrate(
            f, x0, 1.23, method=make(max_order=max_order), step_size=0.1, adjoint=adjoint
        )
        before = calls
        grads.append(torch.autograd.grad(solution.x.square().sum(), (a, x0)))
        counts.append((before, calls - before))
    assert counts[0] == (counts[1][0], 0) and counts[1][0] == counts[1][1]
    for direct, checkpointed in zip(*grads, strict=True):
        assert_close("gradient", checkpointed, direct, tolerance=1e-14)


@pytest.mark.parametrize("max_order", range(4, 13))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [20, 21.4])
def test_the_climbing_form_is_torchdiffeqs(method, max_order, steps):
    a = diffusion_matrix()
    x0 = torch.randn(12, 2, dtype=F64)
    make = {"explicit_adams": ExplicitAdams, "implicit_adams": ImplicitAdams}[method]
    calls = [0, 0]

    def f(which):
        def field(t, x):
            calls[which] += 1
            return torch.tanh(a @ x) * math.cos(t)

        return field

    # Beyond its limit of stability, 0.0017 at order 11, a method multiplies every rounding.
    step = 0.05 if method == "implicit_adams" else 0.0015
    T = steps * step
    got = gf.integrate(f(0), x0, T, method=make(max_order=max_order), step_size=step).x
    grid = torch.tensor([0.0, T], dtype=F64)
    options = {"step_size": step, "max_order": max_order}
    want = torchdiffeq.odeint(f(1), x0, grid, method=method, options=options)[-1]
    ulp = torch.finfo(F64).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= 16 * ulp * steps
    assert calls[0] == calls[1]


def test_corrections_that_do_not_settle_drop_the_oldest_evaluation_as_torchdiffeq():
    a = 3 * diffusion_matrix()
    x0 = torch.randn(12, 2, dtype=F64)
    options = {"max_iters": 2, "max_order": 8, "step_size": 0.1}
    grid = torch.tensor([0.0, 1.5], dtype=F64)
    solver = ImplicitAdams(max_iters=2, max_order=8)
    with pytest.warns(UserWarning, match="did not meet the tolerance.*smaller step_size"):
        got = gf.integrate(lambda t, x: a @ x, x0, 1.5, method=solver, step_size=0.1).x
    with pytest.warns(UserWarning, match="did not converge"):
        want = torchdiffeq.odeint(
            lambda t, x: a @ x, x0, grid, method="implicit_adams", options=options
        )[-1]
    assert_close("x(T)", got, want, tolerance=1e-13)


@pytest.mark.parametrize("shape", [(0,), (), (0, 3)])
def test_states_of_few_elements(shape):
    for method in METHODS:
        x0 = torch.ones(shape, dtype=F64)
        got = gf.integrate(lambda t, x: -x, x0, 1.0, method=method, step_size=0.1).x
        assert_close("x(T)", got, math.exp(-1.0) * x0, tolerance=1e-4)  # h⁴


BAD = {
    "order 3": (ValueError, "max_order.*4 to 12, got 3", {"max_order": 3}),
    "order 13": (ValueError, "max_order.*4 to 12, got 13", {"max_order": 13}),
    "order type": (TypeError, "max_order.*int or None, got float", {"max_order": 4.0}),
    "iters 0": (ValueError, "max_iters.*at least 1, got 0", {"max_iters": 0}),
    "iters type": (TypeError, "max_iters.*int, got float", {"max_iters": 1.0}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, text, options = BAD[case]
    with pytest.raises(error, match=text) as caught:
        ImplicitAdams(**options)
    assert str(caught.value).startswith("ImplicitAdams: ")
