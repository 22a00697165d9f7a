"""`gf.odeint_adjoint` against torchdiffeq's: the same two solves."""

import pytest
import torch
import torchdiffeq

import grand_fast as gf
from grand_fast.solvers import AbstractTerm
from grand_fast.testing import assert_close
from tests._pairwise import pairwise

F64 = torch.float64


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w = torch.nn.Parameter(torch.randn(4, 4, dtype=F64, generator=generator))
        self.b = torch.nn.Parameter(torch.randn(4, dtype=F64, generator=generator))
        self.nfe = 0

    def forward(self, t, x):
        self.nfe += 1
        return torch.tanh(x @ self.w + self.b) * t.cos() - x


class PairNet(Net):
    def forward(self, t, state):
        x, y = state
        return super().forward(t, x), -y * x.sum()


def gradients(solve, net, y0, t, **options):
    ys = solve(net, y0, t, **options)
    total = sum(part.square().sum() for part in (ys if isinstance(ys, tuple) else (ys,)))
    inputs = (*(y0 if isinstance(y0, tuple) else (y0,)), net.w, net.b)
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return ys, grads, net.nfe


def largest(state):
    return max(part.abs().max() for part in state)


CALLS = {
    "default": {},
    "rk4": {"method": "rk4", "options": {"step_size": 0.1}},
    "implicit_adams": {"method": "implicit_adams", "options": {"step_size": 0.1, "max_order": 4}},
    "bosh3": {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4},
    "dopri8": {"method": "dopri8"},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "own norm": {"adjoint_options": {"norm": largest}},
    "tolerances": {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-4},
    "other method": {"adjoint_method": "bosh3", "adjoint_rtol": 1e-4, "adjoint_atol": 1e-4},
    "options": {"method": "dopri5", "options": {"first_step": 0.05}},
    "both options": {"method": "rk4", "options": {"step_size": 0.1}, "adjoint_method": "dopri5",
                     "adjoint_options": {"first_step": 0.05}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*did not")  # corrections that do not settle
@pairwise(call=list(CALLS), net={"Net": Net, "PairNet": PairNet}, falls=[False, True])
def test_agrees_with_torchdiffeq(call, net, falls):
    x = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) / 3
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    t = t.flip(0) if falls else t
    answers = []
    for solve in (gf.odeint_adjoint, torchdiffeq.odeint_adjoint):
        y0 = x.clone().requires_grad_()
        y0 = (y0, torch.ones(2, dtype=F64, requires_grad=True)) if net is PairNet else y0
        answers.append(gradients(solve, net(), y0, t, **CALLS[call]))
    (ys, got, nfe), (their_ys, want, their_nfe) = answers
    for ours, theirs in zip(ys, their_ys, strict=True):
        assert_close("states", ours, theirs, tolerance=1e-11)
    for ours, theirs in zip(got, want, strict=True):
        assert_close("gradient", ours, theirs, tolerance=1e-9)
    assert nfe == their_nfe


def test_norm_of_a_tuple_state_sees_its_parts():
    seen = set()

    def norm(state):
        seen.add(len(state))
        return torch.stack([part.abs().max() for part in state]).max()

    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    y0 = (x, torch.ones(2, dtype=F64))
    t = torch.tensor([0.0, 0.5], dtype=F64)
    ys = gf.odeint_adjoint(PairNet(), y0, t, adjoint_options={"norm": norm})
    ys[1].sum().backward()
    assert seen == {1 + 2 + 2 + 2}  # the time's, states, their adjoints, parameters'


def test_callbacks_of_the_second_solve():
    heard = []

    class Listening(Net):
        def callback_step(self, t0, y0, dt):
            heard.append("forward")

        def callback_step_adjoint(self, t0, y0, dt):
            assert len(y0) == 3 + 2
            heard.append("backward")

    y0 = torch.randn(5, 4, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    options = {"step_size": 0.25}
    gf.odeint_adjoint(Listening(), y0, t, method="rk4", options=options).sum().backward()
    assert heard == ["forward"] * 4 + ["backward"] * 4


def test_a_function_with_parameters_given():
    w = torch.randn(4, 4, dtype=F64, requires_grad=True)
    y0 = torch.randn(5, 4, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)

    class Term(AbstractTerm):
        def vf(self, t, x):
            return torch.tanh(x @ w) - x

    for func in (Term(), lambda t, x: torch.tanh(x @ w) - x):
        ys = gf.odeint_adjoint(func, y0, t, adjoint_params=(p for p in (w,)))
        got = torch.autograd.grad(ys[-1].square().sum(), (y0, w))
        exact = gf.odeint(func, y0, t, rtol=1e-10, atol=1e-10)
        want = torch.autograd.grad(exact[-1].square().sum(), (y0, w))
        for ours, theirs in zip(got, want, strict=True):
            assert_close("gradient", ours, theirs, tolerance=1e-6)


def test_a_field_that_no_gradient_passes():
    y0 = torch.ones(3, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    ys = gf.odeint_adjoint(lambda t, x: torch.ones_like(x), y0, t, adjoint_params=())
    (dy,) = torch.autograd.grad(ys[-1].sum(), y0)
    assert_close("gradient", dy, torch.ones(3, dtype=F64))


def test_memory_does_not_grow_with_the_steps():
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    y0 = torch.randn(5, 4, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    sizes = []
    for step in (0.1, 0.01):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gf.odeint_adjoint(Net(), y0, t, method="rk4", options={"step_size": step})
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1] == 2 * 20 + 16 + 4


def test_gradient_by_the_times():
    y0 = torch.randn(5, 4, dtype=F64)
    grads = []
    for solve in (gf.odeint_adjoint, torchdiffeq.odeint_adjoint):
        t = torch.tensor([0.0, 0.5, 1.0], dtype=F64, requires_grad=True)
        grads.append(torch.autograd.grad(solve(Net(), y0, t).square().sum(), t)[0])
    assert_close("gradient", *grads, tolerance=1e-12)


def test_parameters_without_gradient_are_left_out():
    net = Net()
    net.b.requires_grad_(False)
    y0 = torch.randn(5, 4, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.warns(UserWarning, match="no part of the adjoint norm"):
        ys = gf.odeint_adjoint(net, y0, t, adjoint_options={"norm": largest})
    ys.sum().backward()
    assert net.w.grad is not None and net.b.grad is None


BAD = {
    "no module": ("`func` must be a Module", {"func": lambda t, y: y}),
    "options": ("`adjoint_options` must be given",
                {"method": "rk4", "options": {"step_size": 0.1}, "adjoint_method": "dopri5"}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    text, options = BAD[case]
    call = {"func": Net(), "y0": torch.ones(4, dtype=F64), "t": torch.tensor([0.0, 1.0]), **options}
    with pytest.raises(ValueError, match=text):
        gf.odeint_adjoint(**call)
