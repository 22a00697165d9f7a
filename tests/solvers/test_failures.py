"""Failure is a result: a status, the time reached and what to try; and what must not fail."""

import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grand_fast as gf
from grand_fast.solvers import ADAPTIVE, METHODS, SolveError
from grand_fast.testing import assert_close, random_graph

GENERAL = [name for name, make in METHODS.items() if not make(1e-6, 1e-6).wants_matrix]
FIXED = [name for name in GENERAL if name not in ADAPTIVE]


def blow_up(t, x):
    """`x' = x²` from 1 has no solution from t = 1 on."""
    return x.square()


def one(n=3, dtype=torch.float64):
    return torch.ones(n, dtype=dtype)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_step_too_small(method):
    solution = gf.integrate(blow_up, one(), 2.0, method=method, rtol=1e-3, atol=1e-3)
    assert solution.status is gf.Status.STEP_TOO_SMALL
    assert solution.t == pytest.approx(1.0, abs=1e-2)
    assert torch.isfinite(solution.x).all()
    assert solution.stats.accepted > 0
    with pytest.raises(SolveError, match=r"STEP_TOO_SMALL at t = .*larger tolerances.*float64"):
        solution.check()


def test_step_too_small_at_the_start():
    """No step is short enough for a field that never settles; it ends, and without underflow."""
    signs = iter(range(10**9))

    def noise(t, x):
        return torch.full_like(x, 1e300 * (-1) ** next(signs))

    solution = gf.integrate(noise, one(), 1.0, method="dopri5")
    assert solution.status is gf.Status.STEP_TOO_SMALL
    assert solution.t == 0.0 and torch.equal(solution.x, one())


@pytest.mark.parametrize("limit", ["max_steps", "max_nfe"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "bosh3", "explicit_adams"])
def test_max_steps(method, limit):
    solution = gf.integrate(
        lambda t, x: -x, one(), 10.0, method=method, step_size=0.1, rtol=1e-6, atol=1e-6,
        **{limit: 12},
    )  # fmt: skip
    stats = solution.stats
    assert solution.status is gf.Status.MAX_STEPS
    assert 0 < solution.t < 10
    if limit == "max_steps":
        assert stats.accepted + stats.rejected == 12
    else:
        assert 12 <= stats.nfe < 12 + 7  # the step that passes the limit still counts
    assert_close("x(t)", solution.x, one() * math.exp(-solution.t), tolerance=1e-4)
    with pytest.raises(SolveError, match="MAX_STEPS at t = .*max_steps or max_nfe"):
        solution.check()


def test_a_limit_that_suffices_changes_nothing():
    free = gf.integrate(lambda t, x: -x, one(), 1.0, step_size=0.1)
    bound = gf.integrate(lambda t, x: -x, one(), 1.0, step_size=0.1, max_steps=10, max_nfe=40)
    assert bound.status is gf.Status.SUCCESS and torch.equal(free.x, bound.x)


@pytest.mark.parametrize("method", GENERAL)
@pytest.mark.parametrize("source", ["state", "field"])
def test_nan(method, source):
    def field(t, x):
        return -x if source == "state" else x * math.nan

    x0 = one() * (math.nan if source == "state" else 1.0)
    solution = gf.integrate(field, x0, 1.0, method=method, step_size=0.1)
    assert solution.status is gf.Status.NON_FINITE
    assert solution.stats.nfe < 200
    assert solution.t == (0.0 if method in ADAPTIVE else 1.0)
    # Fixed steps look at the state when they are done.
    when = "0: " if method in ADAPTIVE else "1 or before: "
    with pytest.raises(SolveError, match=f"NON_FINITE at t = {when}.*inputs without NaN"):
        solution.check()


def test_a_state_that_overflows_half_way():
    solution = gf.integrate(
        lambda t, x: x * (math.inf if t > 0.5 else 1.0), one(), 1.0, method="dopri5"
    )
    assert solution.status is gf.Status.NON_FINITE
    assert solution.t == pytest.approx(0.5)
    assert_close("x(t)", solution.x, one() * math.exp(solution.t), tolerance=1e-6)


def test_a_step_into_overflow_is_only_rejected():
    """A long step along x' = 1 − exp(x) leaves the range of numbers, shorter ones do not."""
    solution = gf.integrate(
        lambda t, x: 1 - torch.exp(x), 5 * one(), 50.0, method="dopri5", first_step=10.0
    )
    assert solution.check().stats.rejected > 0
    assert_close("x(T)", solution.x, 0 * one(), tolerance=1e-6)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_times_that_were_not_reached_are_nan(method):
    times = [0.0, 0.5, 1.5, 2.0]
    for end in ("clamp", "interp"):
        solution = gf.integrate(
            blow_up, one(), 2.0, method=method, times=times, end=end, rtol=1e-4, atol=1e-4
        )
        assert solution.status is gf.Status.STEP_TOO_SMALL
        assert_close("x(0.5)", solution.xs[1], 2 * one(), tolerance=1e-2)
        assert solution.xs[2:].isnan().all()


@pytest.mark.parametrize("method", METHODS)
def test_no_time(method):
    x0 = one().requires_grad_()
    solution = gf.integrate(lambda t, x: -x, x0, 0.0, method=method, times=[0.0])
    assert solution.check().t == 0.0
    assert torch.equal(solution.x, x0) and torch.equal(solution.xs[0], x0)
    assert (solution.stats.accepted, solution.stats.rejected) == (0, 0)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("method", GENERAL)
def test_empty_state(method, shape):
    x0 = torch.ones(shape, requires_grad=True)
    times = [0.0, 0.25, 1.0]
    for adjoint in ("direct", "checkpoint"):
        solution = gf.integrate(
            lambda t, x: -x, x0, 1.0, method=method, step_size=0.5, times=times, adjoint=adjoint
        )
        assert solution.check().x.shape == shape and solution.xs.shape == (3, *shape)
        (dx,) = torch.autograd.grad(solution.x.sum(), x0)
        assert dx.shape == shape


@pytest.mark.parametrize("times", [[1.0, 0.5], [0.0, 0.0], [-0.1, 1.0], [0.5, 1.5], []])
def test_bad_times(times):
    with pytest.raises(ValueError, match=r"`times` must rise within \[0, T\] = \[0, 1\], got"):
        gf.integrate(lambda t, x: -x, one(), 1.0, times=times)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_tolerances_below_reach_are_raised_with_a_warning(method, caplog):
    exact = one(100) * math.exp(-2.0)
    with caplog.at_level(logging.WARNING, "grand_fast"):
        narrow = gf.integrate(
            lambda t, x: -x, one(100, torch.float32), 2.0, method=method, rtol=1e-12, atol=0.0
        )
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    for part in ("rtol = 1e-12", "float32", "goes on with atol = ", "Use float64"):
        assert part in message
    assert narrow.check().stats.nfe < 20_000
    assert_close("x(T)", narrow.x.double(), exact, tolerance=1e-5)

    caplog.clear()
    with caplog.at_level(logging.WARNING, "grand_fast"):
        gf.integrate(lambda t, x: -x, one(), 1.0, method=method, rtol=1e-6, atol=1e-6)
    assert not caplog.records


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_grand_in_float32_at_tolerances_of_float64(method, caplog):
    """What ends in `underflow in dt` elsewhere."""
    graph = random_graph("hub")
    model = gf.nn.GRAND(5, 8, 3, T=8.0, heads=2, method=method, rtol=1e-12, source=True)
    with torch.no_grad():  # as sharp as training makes it
        for parameter in model.field.parameters():
            parameter.mul_(4)
        model.field.scale.beta.fill_(0.5)
    x = torch.randn(graph.num_nodes, 5)
    with caplog.at_level(logging.WARNING, "grand_fast"):
        logits = model(x, graph)
    if method == "bosh3":  # its default atol, 1e-6, is above float32's resolution
        caplog.clear()
    assert model.failure is None and model.t == 8.0
    want = model.double()
    model.rtol, model.atol = 1e-9, 1e-11
    assert_close("logits", logits.double(), want(x.double(), graph), tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_elements_that_stay_0_need_no_absolute_tolerance(method, dtype):
    x0 = torch.tensor([1.0, 0.0], dtype=dtype)
    solution = gf.integrate(lambda t, x: -x, x0, 1.0, method=method, rtol=1e-3, atol=0.0)
    assert solution.check().x[1] == 0
    assert_close("x(T)", solution.x, x0 * math.exp(-1.0), tolerance=1e-2)


class HostReads(TorchDispatchMode):
    """Counts values that the host reads from tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
                    torch.ops.aten.equal.default, torch.ops.aten.nonzero.default):  # fmt: skip
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
def test_one_host_read_an_attempt(method, adjoint):
    graph = random_graph("random", 12)
    x = torch.randn(12, 4)
    model = gf.nn.GRAND(4, 4, 3, T=4.0, heads=2, method=method, source=True, adjoint=adjoint)
    reads, attempts = [], []
    for tolerance in (1e-2, 1e-4):
        model.rtol = model.atol = tolerance
        model(x, graph).sum().backward()  # the graph is planned once
        with HostReads() as host:
            model(x, graph).sum().backward()
        reads.append(host.count)
        attempts.append(model.stats.accepted + model.stats.rejected)
    assert attempts[1] > attempts[0]
    assert reads[1] - reads[0] == attempts[1] - attempts[0]
    # Before the steps: one for what float32 attains, three for the first step
    assert reads[0] <= attempts[0] + 4


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "rk4_classic"])
@pytest.mark.parametrize("variant", ["l", "nl"])
def test_no_host_read_with_fixed_steps(method, variant):
    graph = random_graph("random", 12)
    model = gf.nn.GRAND(4, 4, 3, variant=variant, T=4.0, heads=2, method=method, source=True)
    x = torch.randn(12, 4)
    model(x, graph).sum().backward()  # the graph is planned once
    with HostReads() as host:
        model(x, graph).sum().backward()
    assert host.count == 0
    with HostReads() as host:
        assert model.status is gf.Status.SUCCESS
    assert host.count == 1
