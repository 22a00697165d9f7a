"""Functions that write their result into memory of their own, and those that make it anew."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grand_fast as gf
from grand_fast.solvers import METHODS, AbstractLinearTerm, AbstractTerm, ContinuousOptions
from grand_fast.solvers import counted as terms
from grand_fast.testing import assert_close, random_graph
from tests._pairwise import pairwise
from tests.solvers._terms import GRADIENTS

F64 = torch.float64
GENERAL = [name for name, make in METHODS.items() if not make(1e-6, 1e-6).wants_matrix]
HOLDING = ["dopri5", "bosh3", "adaptive_heun", "explicit_adams", "implicit_adams"]
OF_ODEINT = ["euler", "midpoint", "rk4", "explicit_adams", "implicit_adams",
             "dopri5", "bosh3", "adaptive_heun"]  # fmt: skip
SHAPE = (3, 2)


class Decay(torch.autograd.Function):
    """`−y` in a buffer, as the output of a CUDA graph is: not one that autograd sees written."""

    @staticmethod
    def forward(ctx, y, buffer):
        buffer.copy_(-y)
        return buffer.detach()

    @staticmethod
    def backward(ctx, grad):
        return -grad, None


def graphed():
    buffer = torch.empty(SHAPE, dtype=F64)
    return lambda t, y: Decay.apply(y, buffer.data)


def out():
    buffer = torch.empty(SHAPE, dtype=F64)
    return lambda t, y: torch.neg(y, out=buffer)


def written_in_place():
    """In operations that autograd sees, which save nothing."""
    buffer = torch.empty(SHAPE, dtype=F64)
    return lambda t, y: buffer.detach().copy_(-y)


def out_in_turn():
    """Two buffers: what the last call but one returned is written again."""
    buffers = [torch.empty(SHAPE, dtype=F64) for _ in range(2)]

    def f(t, y):
        buffers.reverse()
        return torch.neg(y, out=buffers[0])

    return f


def part_of_a_pool():
    pool = torch.empty(20, dtype=F64)
    return lambda t, y: torch.neg(y, out=pool[2:8].view(SHAPE)).view(6).view(SHAPE)


def of_numpy():
    buffer = np.empty(SHAPE)

    def f(t, y):
        np.negative(y.numpy(), out=buffer)
        return torch.from_numpy(buffer)

    return f


FUNCTIONS = [graphed, out, written_in_place, out_in_turn, part_of_a_pool, of_numpy]


def fresh(t, y):
    return -y


def start():
    return torch.linspace(0.5, 2.0, 6, dtype=F64).view(SHAPE)


def options_of(method):
    return {"method": method, "step_size": 0.1, "rtol": 1e-3, "atol": 1e-4}


@pytest.mark.parametrize("make", FUNCTIONS)
@pytest.mark.parametrize("method", GENERAL)
@torch.no_grad()
def test_a_slope_stays_when_its_function_is_called_again(method, make):
    options = options_of(method) | {"times": [0.33, 1.0], "end": "interp"}
    got, want = (gf.integrate(f, start(), 1.0, **options) for f in (make(), fresh))
    assert got.stats == want.stats
    assert_close("states", got.xs, want.xs, tolerance=1e-14)
    assert_close("x(T)", got.x, start() * math.exp(-1), tolerance=6e-2)


PENALIZED = {
    "all penalties": {"regularizers": ["kinetic", "directional", "jacobian"]},
    "direct penalties": {"regularizers": ["kinetic", "directional"], "adjoint": "direct"},
}


@pairwise(
    gradient=GRADIENTS | PENALIZED,
    method=["rk4", *HOLDING],
    make={"graphed": graphed, "written_in_place": written_in_place},
)
def test_gradients(method, make, gradient):
    found = []
    for f in (make(), fresh):
        x0 = start().requires_grad_()
        torch.manual_seed(0)
        solution = gf.integrate(f, x0, 1.0, **options_of(method), **gradient)
        loss = solution.x.square().sum() + sum(p.sum() for p in solution.penalties.values())
        found.append((solution.x.detach(), *torch.autograd.grad(loss, x0)))
    for got, want in zip(*found, strict=True):
        assert_close("state or gradient", got, want, tolerance=1e-13)


@pairwise(
    method=OF_ODEINT,
    times={"rising": [0.0, 0.33, 1.0], "falling": [1.0, 0.4, 0.0]},
    solve={"odeint": gf.odeint, "odeint_adjoint": gf.odeint_adjoint},
)
def test_odeint(method, times, solve):
    t = torch.tensor(times, dtype=F64)
    is_adaptive = METHODS[method](1.0, 1.0).is_adaptive
    options = {} if is_adaptive else {"step_size": 0.1, "interp": "cubic"}
    if "adams" in method:
        options["max_order"] = 4
    call = {"method": method, "options": options, "rtol": 1e-2, "atol": 1e-3}
    call |= {} if solve is gf.odeint else {"adjoint_params": ()}
    for make in FUNCTIONS:
        if make is graphed:
            y0 = start().requires_grad_()
            got, want = (solve(f, y0, t, **call) for f in (make(), fresh))
            grads = [torch.autograd.grad(ys.square().sum(), y0)[0] for ys in (got, want)]
            assert_close("gradient", *grads, tolerance=1e-12)
        else:
            with torch.no_grad():
                got, want = (solve(f, start(), t, **call) for f in (make(), fresh))
        assert_close("states", got.detach(), want.detach(), tolerance=1e-14)


@pytest.mark.parametrize("method", OF_ODEINT)
@torch.no_grad()
def test_odeint_of_tuples(method):
    t = torch.linspace(0, 1, 11, dtype=F64)
    for parts in (1, 2):
        functions = [out() for _ in range(parts)]
        y0 = tuple(start() * (1 + i) for i in range(parts))

        def f(t, ys, functions=functions):
            return tuple(of_part(t, y) for of_part, y in zip(functions, ys, strict=True))

        options = {"method": method, "rtol": 1e-3, "atol": 1e-4}
        got = gf.odeint(f, y0, t, **options)
        want = gf.odeint(lambda t, ys: tuple(-y for y in ys), y0, t, **options)
        for g, w in zip(got, want, strict=True):
            assert_close("states", g, w, tolerance=1e-14)


ONES = torch.ones(SHAPE, dtype=F64)
GROWTH = {  # a function of the initial state: f, and x(1)
    "the state itself": lambda x0: (lambda t, y: y, x0 * math.e),
    "a view of the state": lambda x0: (lambda t, y: y[:], x0 * math.e),
    "the initial state": lambda x0: (lambda t, y: x0, 2 * x0),
    "a constant": lambda x0: (lambda t, y: ONES, x0 + 1),
}


@pairwise(
    method=["rk4", *HOLDING],
    kind=list(GROWTH),
    adjoint=["direct", "checkpoint", "continuous"],
)
def test_functions_that_return_what_is_there(method, kind, adjoint):
    x0 = start().requires_grad_()
    f, want = GROWTH[kind](x0)
    options = {"method": method, "step_size": 0.05, "rtol": 1e-4, "atol": 1e-5}
    if adjoint == "continuous":
        # By the tensors that f holds, as a term would name them
        params = [x0] if kind == "the initial state" else []
        options["adjoint_options"] = ContinuousOptions(params=params)
    x = gf.integrate(f, x0, 1.0, adjoint=adjoint, **options).x
    assert_close("x(T)", x.detach(), want.detach(), tolerance=1e-3)
    (dx,), (dwant,) = (torch.autograd.grad(y.square().sum(), x0) for y in (x, want))
    assert_close("gradient", dx, dwant, tolerance=1e-3)
    assert torch.equal(x0, start()) and bool((ONES == 1).all())


@pytest.mark.parametrize("method", HOLDING)
def test_a_buffer_that_autograd_saves(method):
    """Its backward finds that it was changed; the state, found before that, is right."""
    buffer, x0 = torch.empty(SHAPE, dtype=F64), start().requires_grad_()
    states = [
        gf.integrate(f, x0, 1.0, adjoint="direct", **options_of(method)).x.detach()
        for f in (lambda t, y: buffer.detach().copy_(y).tanh_(), lambda t, y: y.tanh())
    ]
    assert_close("x(T)", *states, tolerance=1e-14)


def test_in_a_compiled_program():
    buffer = torch.empty(SHAPE, dtype=F64)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def solve(x):
        def f(t, y):
            return torch.neg(y, out=buffer)

        return gf.integrate(f, x, 1.0, method="explicit_adams", step_size=0.2).x

    with torch.no_grad():
        want = gf.integrate(fresh, start(), 1.0, method="explicit_adams", step_size=0.2).x
        assert_close("x(T)", solve(start()), want, tolerance=1e-13)


class BufferedTerm(AbstractTerm):
    """Its fused step, too, writes into a buffer."""

    def __init__(self):
        self.f, self.y = torch.empty(2, *SHAPE, dtype=F64)

    def vf(self, t, x):
        return torch.neg(x, out=self.f)

    def axpy(self, t, x, base, tau):
        return torch.add(base.evaluate(), x, alpha=-tau, out=self.y)


@pytest.mark.parametrize("method", GENERAL)
@torch.no_grad()
def test_a_term_that_writes_its_fused_step_into_a_buffer(method):
    states = []
    for term in (BufferedTerm(), fresh):
        solution = gf.integrate(term, start(), 1.0, times=[0.5, 1.0], **options_of(method))
        states.append(torch.stack([*solution.xs, solution.x]))
    assert_close("states", *states, tolerance=1e-13)


class BufferedMatrix(AbstractLinearTerm):
    alpha, beta, source = 1.5, None, None

    def __init__(self, buffer):
        self.a = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.0, 0.1], [0.3, 0.3, 0.4]], dtype=F64)
        self.buffer = buffer

    def matrix(self, a, y, scale, add):
        total = torch.mm(a, y).mul_(scale)
        for c, z in add:
            total.add_(z, alpha=c)
        return total if self.buffer is None else self.buffer.copy_(total)

    def vf(self, t, x):
        return self.matrix(self.a, x, self.alpha, [(-self.alpha, x)])


@pytest.mark.parametrize("method", [
    "uniformisation",
    "semi_implicit_euler",
    gf.solvers.SemiImplicitEuler(linear_solver="fixed_point"),
    gf.solvers.SemiImplicitEuler(linear_solver="bicgstab", tol=1e-9),
])  # fmt: skip
@torch.no_grad()
def test_products_with_a_matrix(method):
    terms = BufferedMatrix(torch.empty(SHAPE, dtype=F64)), BufferedMatrix(None)
    got, want = (gf.integrate(term, start(), 2.0, method=method, step_size=2.0) for term in terms)
    assert got.stats == want.stats
    assert_close("x(T)", got.x, want.x, tolerance=1e-14)


class Copies(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


w = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64)
NEW = {
    "negative": lambda y: -y,
    "linear": torch.nn.Linear(2, 2, dtype=F64),
    "saved by autograd": lambda y: torch.tanh(y @ w),
    "view": lambda y: (y @ w).view(6).view(SHAPE),
    "view of what autograd saves": lambda y: torch.tanh(y @ w)[:],
    "changed in place": lambda y: (y @ w).add_(1.0),
}


def copies(monkeypatch, solve):
    """Made in a solve, and if solvers trusted every function."""
    counts = []
    for trust in (False, True):
        with monkeypatch.context() as patched, Copies() as counted:
            if trust:
                patched.setattr(terms, "owned", lambda f: f)
            solve()
        counts.append(counted.count)
    return counts


@pairwise(
    kind=list(NEW),
    method=["dopri5", "adaptive_heun", "implicit_adams"],
    adjoint=[None, "direct", "checkpoint"],
)
def test_what_is_made_anew_is_not_copied(method, kind, adjoint, monkeypatch):
    options = options_of(method) | ({} if adjoint is None else {"adjoint": adjoint})
    backward = False

    def solve():
        x0 = start().requires_grad_()
        x = gf.integrate(lambda t, y: NEW[kind](y), x0, 1.0, **options).x
        if backward:
            x.sum().backward()

    with torch.set_grad_enabled(adjoint is not None):
        got, want = copies(monkeypatch, solve)
        assert got == want
        if adjoint is not None:
            backward = True
            got, want = copies(monkeypatch, solve)
            assert got == want


@pytest.mark.parametrize("variant", ["l", "nl"])
@pytest.mark.parametrize("method", ["rk4", *HOLDING, "semi_implicit_euler", "uniformisation"])
def test_results_of_our_own_terms_are_not_copied(method, variant, monkeypatch):
    if (method, variant) == ("uniformisation", "nl"):
        pytest.skip("for linear terms")
    graph, x = random_graph("loops", 12), torch.randn(12, 4)
    model = gf.nn.GRAND(4, 4, 3, T=2.0, variant=variant, method=method, step_size=0.5)
    model.rtol = model.atol = 1e-2
    model(x, graph)  # the graph is planned once
    got, want = copies(monkeypatch, lambda: model(x, graph).sum().backward())
    assert got == want


def test_a_function_that_keeps_what_it_made_is_copied(monkeypatch):
    """So that the count above can tell."""
    kept = []

    def f(t, y):
        kept.append(-y)
        return kept[-1]

    got, want = copies(monkeypatch, lambda: gf.integrate(f, start(), 1.0, **options_of("dopri5")))
    assert got - want == len(kept) / 2


def test_nor_once_torch_compile_has_failed(monkeypatch):
    """It then leaves its own evaluation of frames behind, under which a call holds one more."""

    def breaks(y):
        torch._dynamo.graph_break()
        return y

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(breaks, fullgraph=True, backend="eager")(start())
    for kind, f in NEW.items():
        with torch.no_grad():
            got, want = copies(
                monkeypatch, lambda: gf.integrate(lambda t, y: f(y), start(), 1.0, method="dopri5")
            )
        assert got == want, kind
