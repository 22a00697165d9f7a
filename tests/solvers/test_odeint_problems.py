"""Problems with known answers, those by which torchdiffeq tests itself, through `gf.odeint`."""

import math

import pytest
import torch
import torchdiffeq

import grand_fast as gf
from grand_fast.testing import assert_close

F64 = torch.float64


class Constant(torch.nn.Module):
    """`y' = a + (y − (a t + b))⁵`, whose answer is the line `a t + b`."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.2, dtype=F64))
        self.b = torch.nn.Parameter(torch.tensor(3.0, dtype=F64))

    def forward(self, t, y):
        return self.a + (y - (self.a * t + self.b)) ** 5

    def exact(self, t):
        return (self.a * t + self.b)[:, None]


class Linear(torch.nn.Module):
    """`y' = A y` with eigenvalues on the left of the axis, answered by the matrix exponential."""

    def __init__(self):
        super().__init__()
        u = torch.randn(10, 10, generator=torch.Generator().manual_seed(1), dtype=F64)
        self.matrix = torch.nn.Parameter(0.3 * (u - u.T) - 0.1 * torch.eye(10, dtype=F64))

    def forward(self, t, y):
        return self.matrix @ y

    def exact(self, t):
        start = torch.arange(1, 11, dtype=F64)
        return torch.stack([torch.linalg.matrix_exp(self.matrix * s) @ start for s in t - 1.0])


class Sine(torch.nn.Module):
    """`y' = 2y/t + t⁴ sin 2t − t² + 4t³`, singular at 0."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, t, y):
        return self.one * (2 * y / t + t**4 * torch.sin(2 * t) - t**2 + 4 * t**3)

    def exact(self, t):
        y = (-0.5 * t**4 * torch.cos(2 * t) + 0.5 * t**3 * torch.sin(2 * t)
             + 0.25 * t**2 * torch.cos(2 * t) - t**3 + 2 * t**4
             + (math.pi - 0.25) * t**2)  # fmt: skip
        return y[:, None]


PROBLEMS = {"constant": Constant, "linear": Linear, "sine": Sine}
# Errors of the largest value at steps of 0.01, or at tolerances of 1e-7 and 1e-9
METHODS = {
    "euler": 5e-2, "midpoint": 1e-3, "rk4": 1e-6, "explicit_adams": 1e-5, "implicit_adams": 1e-5,
    "dopri5": 1e-6, "bosh3": 1e-4, "adaptive_heun": 1e-3, "dopri8": 1e-4,
}  # fmt: skip
ON_A_GRID = ("euler", "midpoint", "rk4", "explicit_adams", "implicit_adams")


def options_of(method):
    if method not in ON_A_GRID:
        # 10⁴ steps of order 2 at tighter ones
        return {"rtol": 1e-5, "atol": 1e-6} if method == "adaptive_heun" else {}
    options = {"step_size": 0.01}
    if "adams" in method:
        options["max_order"] = 5
    return {"options": options}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_answers(problem, method, reverse):
    f = PROBLEMS[problem]()
    t = torch.linspace(1.0, 4.0, 7, dtype=F64)
    want = f.exact(t).detach()
    if reverse:
        t, want = t.flip(0), want.flip(0)
    with torch.no_grad():
        got = gf.odeint(f, want[0], t, method=method, **options_of(method))
    assert_close("answers", got, want, tolerance=METHODS[method])


@pytest.mark.parametrize("solve", [gf.odeint, gf.odeint_adjoint])
@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "dopri5"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients(problem, method, solve):
    """By the state and the parameters, against autograd through the exact answer or torchdiffeq."""
    f = PROBLEMS[problem]()
    t = torch.linspace(1.0, 2.0, 5, dtype=F64)
    y0 = f.exact(t)[0].detach()
    y0 = (0.99 * y0).requires_grad_()  # off the constant problem's line, where y' is flat
    inputs = (y0, *f.parameters())
    got = torch.autograd.grad(
        solve(f, y0, t, method=method, **options_of(method)).square().sum(), inputs
    )
    fine = torchdiffeq.odeint(f, y0, t, rtol=1e-10, atol=1e-10)
    want = torch.autograd.grad(fine.square().sum(), inputs)
    for ours, exact in zip(got, want, strict=True):
        assert_close("gradient", ours, exact, tolerance=1e-5)


@pytest.mark.parametrize("solve", [gf.odeint, gf.odeint_adjoint])
@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "dopri5", "dopri8"])
def test_a_ball_meets_the_ground(method, solve):
    """y'' = −g from height 10: at t = √(20 / g)."""

    class Ball(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.g = torch.nn.Parameter(torch.tensor(9.8, dtype=F64))

        def forward(self, t, state):
            height, speed = state
            return speed, -self.g.expand_as(speed)

    ball = Ball()
    y0 = (torch.tensor([10.0], dtype=F64), torch.tensor([0.0], dtype=F64))
    t = torch.tensor([0.0, 1.0], dtype=F64)
    options = {"step_size": 0.01, "interp": "cubic"} if method in ON_A_GRID else {}
    when, (height, speed) = solve(
        ball, y0, t, event_fn=lambda t, s: s[0], method=method, options=options
    )
    assert when.item() == pytest.approx(math.sqrt(20 / 9.8), abs=1e-6)
    assert height.shape == (2, 1) and height[-1].item() == pytest.approx(0.0, abs=1e-5)
    (dg,) = torch.autograd.grad(speed[-1], ball.g)
    assert float(dg) == pytest.approx(-math.sqrt(20 / 9.8), rel=1e-4)  # at that time
