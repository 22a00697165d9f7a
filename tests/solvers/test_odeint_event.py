"""`gf.odeint_event` and `gf.odeint_dense` against torchdiffeq's: the same steps and gradients."""

import math

import pytest
import torch
import torchdiffeq

import grand_fast as gf
from grand_fast.solvers.torchdiffeq import package
from grand_fast.testing import assert_close
from tests._pairwise import pairwise

F64 = torch.float64
PAIRS = ("dopri5", "bosh3", "adaptive_heun")
# The first step is given: torchdiffeq differentiates the one it chooses, by the state
OPTIONS = {"rtol": 1e-3, "atol": 1e-4, "options": {"first_step": 0.02}}


class Falls(torch.nn.Module):
    """A ball in a wind that turns, which lands on a slope of its own."""

    def __init__(self, *, is_tuple=False):
        super().__init__()
        self.gravity = torch.nn.Parameter(torch.tensor(9.8, dtype=F64))
        self.slope = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))
        self.is_tuple, self.nfe, self.steps = is_tuple, 0, []

    def forward(self, t, state):
        self.nfe += 1
        at, speed = state if self.is_tuple else state.unbind()
        f = speed, -self.gravity * torch.ones_like(at) + torch.sin(3 * t) * (at + 2)
        return f if self.is_tuple else torch.stack(f)

    def callback_accept_step(self, t, y, dt):
        self.steps.append((t.item(), dt.item()))

    def lands(self, t, state):
        at, _ = state if self.is_tuple else state.unbind()
        return torch.cat([(at - self.slope * t).reshape(-1), torch.ones(2, dtype=F64)])

    def start(self):
        y0 = torch.tensor([10.0, 1.0], dtype=F64)
        return tuple(y0[:, None].unbind()) if self.is_tuple else y0


@pytest.fixture
def ours_alone(monkeypatch):
    """No solve is handed to torchdiffeq."""

    def refuse():
        raise AssertionError("handed to torchdiffeq")

    monkeypatch.setattr(package, "solvers", refuse)


def landing(package_, interface, *, is_tuple, falls, **options):
    ball = Falls(is_tuple=is_tuple)
    y0 = ball.start()
    leaves = [p.requires_grad_() for p in (y0 if is_tuple else (y0,))]
    t, states = package_.odeint_event(
        ball, y0, torch.tensor(0.2, dtype=F64), event_fn=ball.lands, reverse_time=falls,
        odeint_interface=interface, **(OPTIONS | options),
    )  # fmt: skip
    nfe = ball.nfe
    whole = torch.cat([s.reshape(2, -1) for s in states], 1) if is_tuple else states
    loss = 3 * t + (whole * torch.arange(1.0, 1 + whole.numel()).view_as(whole)).sum()
    grads = torch.autograd.grad(loss, [*leaves, ball.gravity, ball.slope], allow_unused=True)
    return [t, whole, *(g for g in grads if g is not None)], nfe, ball.steps


@pairwise(method=PAIRS, is_tuple=[False, True], falls=[False, True],
          adjoint=["direct", "checkpoint", "auto"])  # fmt: skip
def test_events_are_torchdiffeqs(method, is_tuple, falls, adjoint, ours_alone):
    kind = {"is_tuple": is_tuple, "falls": falls, "method": method}
    got, nfe, steps = landing(gf, gf.odeint, adjoint=adjoint, **kind)
    want, their_nfe, their_steps = landing(torchdiffeq, torchdiffeq.odeint, **kind)
    assert len(got) == len(want)
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(f"value {i}", ours, theirs, tolerance=1e-10)
    assert nfe == their_nfe
    assert [s for step in steps for s in step] == pytest.approx(
        [s for step in their_steps for s in step], rel=1e-6
    )


@pytest.mark.parametrize("is_tuple", [False, True])
def test_events_of_the_continuous_adjoint(is_tuple):
    kind = {"is_tuple": is_tuple, "falls": False}
    got, *_ = landing(gf, gf.odeint_adjoint, **kind)
    want, *_ = landing(torchdiffeq, torchdiffeq.odeint_adjoint, **kind)
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(f"value {i}", ours, theirs, tolerance=1e-9)


@pytest.mark.filterwarnings("ignore:Solver 'rk4' does not support callbacks")
def test_an_event_of_fixed_steps_is_torchdiffeqs_own():
    kind = {"is_tuple": False, "falls": False, "method": "rk4", "options": {"step_size": 0.1}}
    got, *_ = landing(gf, gf.odeint, **kind)
    want, *_ = landing(torchdiffeq, torchdiffeq.odeint, **kind)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
    with pytest.raises(NotImplementedError, match="`adjoint` must be .* an event by fixed steps"):
        landing(gf, gf.odeint, adjoint="checkpoint", **kind)
    with pytest.raises(NotImplementedError, match="`method` must be one of torchdiffeq's where"):
        landing(gf, gf.odeint, is_tuple=False, falls=False, method="rk4_classic")


def test_an_event_at_the_start(ours_alone):
    y0, t = torch.ones(2), torch.tensor([0.0, 1.0])
    when, states = gf.odeint(lambda t, y: y, y0, t, event_fn=lambda t, y: y.sum() - 2)
    assert when == 0 and torch.equal(states, torch.ones(2, 2))


def test_events_that_cannot_be_found(ours_alone):
    y0, t = torch.ones(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)

    def event(t, y):
        return y.sum() + 1

    with pytest.raises(ValueError, match="`t` must hold two times with `event_fn`, got 3"):
        gf.odeint(lambda t, y: y, y0, torch.arange(3.0), event_fn=event)
    with pytest.raises(AssertionError, match="max_num_steps exceeded"):
        gf.odeint(lambda t, y: -y, y0, t, event_fn=event, options={"max_num_steps": 5})
    with pytest.raises(AssertionError, match="underflow in dt"):
        gf.odeint(lambda t, y: y**2, y0, t, event_fn=event, rtol=1e-3, atol=1e-3)
    with pytest.raises(NotImplementedError, match="`memory_limit` must be None with an event_fn"):
        gf.odeint(lambda t, y: y, y0, t, event_fn=event, adjoint="auto", memory_limit=10**6)


def test_an_event_without_tolerance_is_found_to_the_resolution_of_t(ours_alone):
    when, _ = gf.odeint(
        lambda t, y: -y, torch.ones(1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64),
        event_fn=lambda t, y: y[0] - 0.5, rtol=1e-9, atol=0.0,
    )  # fmt: skip
    assert float(when) == pytest.approx(math.log(2), abs=1e-7)


@pairwise(method=[None, *PAIRS], falls=[False, True], dtype=[torch.float32, F64])
def test_dense_output_is_torchdiffeqs(method, falls, dtype, ours_alone):
    w = torch.tensor([[-1.0, 2.0], [-2.0, -0.5]], dtype=dtype, requires_grad=True)
    ends = [torch.tensor(v, dtype=dtype) for v in ((2.0, 0.5) if falls else (0.5, 2.0))]
    answers = []
    for solve in (gf.odeint_dense, torchdiffeq.odeint_dense):
        y0 = torch.tensor([1.0, 0.3], dtype=dtype, requires_grad=True)
        theirs = solve is torchdiffeq.odeint_dense
        if theirs and method not in (None, "dopri5"):  # which has no other
            times = torch.tensor([2.0, 1.6, 1.0] if falls else [0.5, 1.0, 1.6], dtype=dtype)
            ys = torchdiffeq.odeint(lambda t, y: y @ w, y0, times, method=method, **OPTIONS)[1:]
            ys = ys.flip(0) if falls else ys
            values = [*ys, *torch.autograd.grad(ys.sum(), (y0, w))]
            answers.append([*values, None])
            continue
        dense = solve(lambda t, y: y @ w, y0, *ends, method=method, **OPTIONS)
        t = torch.tensor([1.0, 1.6], dtype=dtype, requires_grad=True)
        sign = -1 if theirs and falls else 1
        ys = [dense(sign * v) for v in t]
        values = torch.autograd.grad(sum(ys).sum(), (y0, w, t))
        answers.append([*ys, *values])
    tolerance = 1e-10 if dtype == F64 else 1e-5
    for i, (ours, want) in enumerate(zip(*answers, strict=True)):
        if want is not None:
            assert ours.dtype == dtype
            assert_close(f"value {i}", ours, want, tolerance=tolerance)


def test_dense_output_at_its_ends_and_beyond():
    y0 = torch.ones(3, dtype=F64)
    dense = gf.odeint_dense(lambda t, y: -y, y0, 0.0, 1.0)
    assert_close("start", dense(0.0), y0, tolerance=1e-14)
    for t in (0.4, 1.0):
        assert_close("inside", dense(t), math.exp(-t) * y0, tolerance=1e-7)
    for t, got in ((-0.1, "got -0.1"), (9.0, "got 9"), (torch.ones(2), "got 2 of them")):
        with pytest.raises(ValueError, match=f"`t` must be one time between 0 and .*, {got}"):
            dense(t)
    with pytest.raises(ValueError, match="`method` must be one of dopri5, .*, got 'rk4'"):
        gf.odeint_dense(lambda t, y: -y, y0, 0.0, 1.0, method="rk4")
    with pytest.raises(TypeError, match="`y0` must be a Tensor, got tuple"):
        gf.odeint_dense(lambda t, y: -y, (y0,), 0.0, 1.0)
    with pytest.raises(AssertionError, match="underflow in dt at t = 0.99.*, in odeint_dense"):
        gf.odeint_dense(lambda t, y: y**2, y0, 0.0, 2.0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)], ids=["rises", "falls"])
def test_dense_output_that_torchdiffeq_gives(ends):
    """A complex state."""
    y0 = torch.ones(2, dtype=torch.complex128)
    dense = gf.odeint_dense(lambda t, y: 1j * y, y0, *ends)
    got, turned = dense(0.5), 0.5 - ends[0]
    want = torch.tensor(complex(math.cos(turned), math.sin(turned)), dtype=y0.dtype) * y0
    assert_close("y", torch.view_as_real(got), torch.view_as_real(want), tolerance=1e-6)
