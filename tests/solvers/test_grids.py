"""Where fixed steps end: the times themselves, and that they are computed when they are needed."""

import math
import tracemalloc
from bisect import bisect_left

import pytest
import torch

import grand_fast as gf
from grand_fast.solvers.methods import uniformisation
from grand_fast.solvers.step_control import EvenGrid
from grand_fast.solvers.torchdiffeq.grid import grid_of
from grand_fast.solvers.torchdiffeq.problem import pose
from grand_fast.testing import assert_close
from tests.solvers._terms import linear_problem, linear_term

F64 = torch.float64
TINY = 1e-7  # some 10⁷ steps: 300 MB as a list
MOST_BYTES = 10**7


@pytest.mark.parametrize("step_size", [None, 20.0, 1.0, 0.7, 0.3, 0.1, 1 / 7, 1e-3, 3e-4])
@pytest.mark.parametrize("T", [0.0, 0.3, 0.9, 2.1, 1.0, 18.2948, 1e-4, 1e-12])
def test_ends_of_even_steps(T, step_size):
    count = 1
    if step_size is not None and T > 0:
        count = max(1, math.ceil(T / step_size - 1e-9))
    want = [*(i * (step_size or 0.0) for i in range(count)), T]
    grid = EvenGrid(0.0, T, step_size)
    assert [grid[i] for i in range(count + 1)] == want


STEPS = (20.0, 0.7, 0.1, 1 / 7, 1e-3, 1e-5)  # the last longer than the piece that is computed


@pytest.mark.parametrize(("dtype", "step_size"), [
    *((dtype, step) for dtype in (F64, torch.float32) for step in STEPS),
    # which have fewer numbers than that
    *((dtype, step) for dtype in (torch.float16, torch.bfloat16) for step in STEPS[:-1]),
])  # fmt: skip
@pytest.mark.parametrize("times", [[0.5], [0.0, 1.0], [0.3, 0.55, 1.1], [-3.0, -2.7, 0.0]])
def test_odeints_grid_is_rounded_as_torchdiffeqs(times, step_size, dtype):
    t = torch.tensor(times, dtype=dtype)
    count = int(torch.ceil((t[-1] - t[0]) / step_size + 1))
    points = torch.arange(count, dtype=dtype) * step_size + t[0]
    points[-1] = t[-1]
    want = points.tolist()
    # Where rounding has points before the last at the end, or past it, steps end there.
    want = want[: 1 + next((i for i, v in enumerate(want[1:], 1) if v >= want[-1]), 0)]
    grid = grid_of(pose(lambda t, y: y, torch.ones(1), t, "odeint"), step_size, None)
    assert [grid[i] for i in range(len(want))] == want
    for time in (*t.tolist()[1:], 0.9 * want[-1] + 0.1 * want[0], *want[-2:]):
        assert grid.reaching(time) == bisect_left(want, time)


def traced(call):
    """The most bytes that Python held at a time beside what it had."""
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ADJOINTS = {"no gradient": {}, "direct": {"adjoint": "direct"}, "checkpoint": {},
            "limited": {"memory_limit": 10**6}}  # fmt: skip


@pytest.mark.parametrize("limit", ["max_steps", "max_nfe"])
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "implicit_adams",
                                    "semi_implicit_euler", "uniformisation"])  # fmt: skip
def test_a_solve_that_gives_up_holds_no_more_steps_than_it_took(method, adjoint, limit):
    graph, leaves = linear_problem()
    x0 = leaves["x0"].requires_grad_(adjoint != "no gradient")

    def solve():
        return gf.integrate(
            linear_term(graph, leaves), x0, 1.0, method=method, step_size=TINY, times=[0.5, 1.0],
            **{limit: 10}, **ADJOINTS[adjoint],
        )  # fmt: skip

    with torch.set_grad_enabled(adjoint != "no gradient"):
        solve()
        solution, most = traced(solve)
    assert solution.status is gf.Status.MAX_STEPS
    assert 0 < solution.stats.accepted <= 10 and solution.t <= 11 * TINY
    assert most < MOST_BYTES


@pytest.mark.parametrize("step_size", [1e-100, 1e-320])
def test_steps_too_many_to_count(step_size):
    x0 = torch.ones(3, dtype=F64)
    solution = gf.integrate(
        lambda t, x: -x, x0, 1.0, method="euler", step_size=step_size, max_steps=5
    )
    assert solution.status is gf.Status.MAX_STEPS and solution.t == 5 * step_size


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams"])
def test_odeint_holds_no_more_steps_than_it_took(method, interp):
    calls = []

    def f(t, y):
        calls.append(float(t))
        if len(calls) == 50:
            raise EnoughError
        return -y

    def solve():
        calls.clear()
        t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
        options = {"step_size": TINY, "interp": interp}
        with pytest.raises(EnoughError):
            gf.odeint(f, torch.ones(3, dtype=F64), t, method=method, options=options)

    solve()
    assert traced(solve)[1] < MOST_BYTES
    assert 0 < calls[-1] <= 50 * TINY


@pytest.mark.parametrize(("step_size", "text"), [
    (0.0, "`step_size` must be above 0, got 0"),
    (-0.1, "`step_size` must be above 0, got -0.1"),
    (math.nan, "`step_size` must be above 0, got nan"),
    (1e-30, "`step_size` must make as many steps as float32 can count, got 1e-30"),
])  # fmt: skip
def test_odeint_names_a_step_size_that_makes_no_grid(step_size, text):
    with pytest.raises(ValueError, match=f"odeint: {text}"):
        gf.odeint(
            lambda t, y: y, torch.ones(1), torch.tensor([0.0, 1.0]), method="rk4",
            options={"step_size": step_size},
        )  # fmt: skip


def test_long_steps_of_uniformisation_are_cut(monkeypatch):
    graph, leaves = linear_problem(n=6)
    values = [v.clone().requires_grad_() for v in leaves.values()]

    def solve(**options):
        term = linear_term(graph, dict(zip(leaves, values, strict=True)))
        solution = gf.integrate(term, values[0], 9.0, method="uniformisation", **options)
        return solution, torch.autograd.grad(solution.x.square().sum(), values)

    whole, want = solve()
    monkeypatch.setattr(uniformisation, "_LARGEST_MEAN", 2.0)
    cut, got = solve(times=[1.0, 9.0])
    # q = 0.8 to the first time; then six steps of 2, or shorter
    assert (whole.stats.accepted, cut.stats.accepted) == (1, 1 + 4)
    assert_close("x(T)", cut.x.detach(), whole.x.detach(), tolerance=1e-13)
    for g, w in zip(got, want, strict=True):
        assert_close("gradient", g, w, tolerance=1e-11)


def test_uniformisation_gives_up_over_a_long_time(monkeypatch):
    graph, leaves = linear_problem(n=6)
    monkeypatch.setattr(uniformisation, "_LARGEST_MEAN", 16.0)

    def solve():
        return gf.integrate(
            linear_term(graph, leaves), leaves["x0"], 1e6, method="uniformisation", max_nfe=100
        )

    solution, most = traced(solve)
    assert solution.status is gf.Status.MAX_STEPS and 100 <= solution.stats.nfe < 200
    assert most < MOST_BYTES


def test_a_diffusivity_for_which_no_step_is_short_enough(monkeypatch):
    monkeypatch.setattr(uniformisation, "_LARGEST_MEAN", 16.0)
    graph, leaves = linear_problem(n=6)
    leaves["alpha"] = torch.tensor(1e300, dtype=F64)
    leaves["beta"] = torch.tensor(0.0, dtype=F64)
    solution = gf.integrate(
        linear_term(graph, leaves), leaves["x0"], 1.0, method="uniformisation", max_nfe=10
    )
    assert solution.status is gf.Status.MAX_STEPS and solution.t < 1e-290
