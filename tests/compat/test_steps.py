"""Steps of solvers that are derived from torchdiffeq's: the same, in fewer passes."""

import sys

import pytest
import torch
from torchdiffeq._impl import rk_common
from torchdiffeq._impl.bosh3 import Bosh3Solver
from torchdiffeq._impl.dopri5 import Dopri5Solver
from torchdiffeq._impl.misc import _check_inputs

import grand_fast as gf
from grand_fast.compat import steps
from grand_fast.testing import assert_close

Y0 = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)
# In float32 the error that a step is chosen by is rounded by much of itself if it is small
TOLERANCES = {torch.float32: (3e-2, 3e-2)}
TOLERANCES |= dict.fromkeys((torch.float64, torch.complex128), (1e-5, 1e-6))
ALONE = {"spmm": False, "attention": False, "fields": None, "solver": None}


def solver(base, opt):
    """One that looks at each state on the way, as one that stops early does."""

    class Watching(base):
        def integrate(self, t):
            self.seen, self.tables = [], []
            t = t.to(self.dtype)
            self._before_integrate(t)
            return torch.stack([self.y0, *(self.advance(end) for end in t[1:])])

        def advance(self, end):
            while end > self.rk_state.t1:
                self.rk_state = self._adaptive_step(self.rk_state)
                self.seen.append((self.rk_state.t1, self.rk_state.y1))
            state = self.rk_state
            return rk_common._interp_evaluate(state.interp_coeff, state.t0, state.t1, end)

        if opt.get("fits"):

            def _interp_fit(self, y0, y1, k, dt):
                self.tables.append(k + 0)
                return super()._interp_fit(y0, y1, k, dt)

    return Watching


def solve(base, dtype=torch.float64, f=None, **opt):
    calls = []

    def func(t, y):
        calls.append((t.clone(), y.clone()))
        return torch.sin(3 * y) - t * y if f is None else f(t, y)

    y0, t = Y0.to(dtype), torch.tensor([0.0, 0.7, 2.0], dtype=Y0.to(dtype).real.dtype)
    chosen = {"x": solver(base, opt)}
    _, func, y0, t, rtol, atol, _, options, *_ = _check_inputs(
        func, y0, t, *TOLERANCES[dtype], "x", None, None, chosen
    )
    watching = chosen["x"](func, y0, rtol, atol, **options)
    states = watching.integrate(t)
    return [states, *watching.tables, *(p for pair in [*watching.seen, *calls] for p in pair)]


@pytest.mark.parametrize("fits", [False, True], ids=["", "its own fit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", [Dopri5Solver, Bosh3Solver])
def test_steps_are_the_same(base, dtype, fits):
    with torch.no_grad():
        want = solve(base, dtype, fits=fits)
        with gf.compat.patch(**ALONE) as patch:
            got = solve(base, dtype, fits=fits)
    assert patch.report.used[steps.NAME] > 3 and not patch.report.left
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert_close(str(i), a, b, tolerance=1e-9 if dtype == torch.float64 else 1e-2)


def test_a_field_that_writes_into_one_buffer():
    """torchdiffeq copies each slope into its table."""
    buffer = torch.empty_like(Y0)

    def field(t, y):
        return torch.mul(-t, y, out=buffer)

    with torch.no_grad():
        want = solve(Dopri5Solver, f=field)
        with gf.compat.patch(**ALONE):
            got = solve(Dopri5Solver, f=field)
    assert_close("states", got[0], want[0], tolerance=1e-12)


def test_slopes_of_another_type():
    """torchdiffeq converts them, and the first step is left to it."""
    with torch.no_grad():
        want = solve(Dopri5Solver, torch.float32, lambda t, y: -y.double())
        with gf.compat.patch(**ALONE):
            got = solve(Dopri5Solver, torch.float32, lambda t, y: -y.double())
    assert_close("states", got[0], want[0])


def test_left_as_they_were():
    """With gradients, of complex states, without the option, and once the patch is gone."""
    before = rk_common._runge_kutta_step, vars(rk_common.RKAdaptiveStepsizeODESolver)["_interp_fit"]
    with gf.compat.patch(**ALONE) as patch:
        solve(Dopri5Solver)
        with torch.no_grad():
            solve(Dopri5Solver, torch.complex128)
    with torch.no_grad(), gf.compat.patch(**ALONE | {"early_stop": False}) as without:
        solve(Dopri5Solver)
    assert not patch.report.used and not without.report.used
    after = rk_common._runge_kutta_step, vars(rk_common.RKAdaptiveStepsizeODESolver)["_interp_fit"]
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("place", "name", "becomes"),
    [
        (rk_common, "_runge_kutta_step", lambda func, y0: None),
        (rk_common, "_runge_kutta_step", None),
        (rk_common, "RKAdaptiveStepsizeODESolver", None),
        (rk_common.RKAdaptiveStepsizeODESolver, "_interp_fit", None),
    ],
    ids=["arguments", "no step", "no class", "no fit"],
)
def test_another_torchdiffeq_is_left(monkeypatch, place, name, becomes):
    if becomes is None:
        monkeypatch.delattr(place, name)
    else:
        monkeypatch.setattr(place, name, becomes)
    with gf.compat.patch(**ALONE) as patch:
        assert vars(place).get(name) is becomes
    assert vars(place).get(name) is becomes
    missing = "_runge_kutta_step" if name == "_runge_kutta_step" else "_interp_fit"
    assert list(patch.report.left) == [(steps.NAME, f"its {missing} is not the one that is known")]


def test_without_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq._impl", None)
    with gf.compat.patch(**ALONE) as patch:
        pass
    assert ["torchdiffeq cannot be imported" in why for _, why in patch.report.left] == [True]
