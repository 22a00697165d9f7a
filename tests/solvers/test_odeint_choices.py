"""What `gf.odeint` has beside torchdiffeq's signature: checkpoints, our own methods."""

from contextlib import nullcontext

import pytest
import torch

import grand_fast as gf
from grand_fast.solvers import METHODS as METHODS_OF_INTEGRATE
from grand_fast.solvers import ExplicitAdams, ImplicitAdams, SemiImplicitEuler, Uniformisation
from grand_fast.solvers.methods import tableaux
from grand_fast.solvers.methods.embedded_pairs import EmbeddedRungeKutta
from grand_fast.solvers.torchdiffeq import package
from grand_fast.testing import assert_close
from tests._pairwise import pairwise
from tests.solvers._terms import (
    dense,
    linear_problem,
    linear_term,
    nonlinear_problem,
    nonlinear_term,
)

F64 = torch.float64
METHODS = ("euler", "rk4", "rk4_classic", "explicit_adams", "implicit_adams", "dopri5", "bosh3",
           "adaptive_heun")  # fmt: skip
LIMIT = 60_000  # bytes


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3).double()
        self.nfe = 0

    def forward(self, t, state):
        self.nfe += 1
        x, y = state if isinstance(state, tuple) else (state, state)
        f = torch.tanh(self.linear(x)) * torch.cos(t) - x
        return (f, -y * x.sum()) if isinstance(state, tuple) else f


def solved(adjoint, method, *, interp="linear", falls=False, is_tuple=False, limit=None):
    """The states, and their gradients; evaluations, those of backward too; bytes kept."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(20, 3, dtype=F64, requires_grad=True)
    y0 = (x, torch.ones(2, dtype=F64, requires_grad=True)) if is_tuple else x
    t = torch.tensor([0.0, 0.33, 0.35, 1.2], dtype=F64)
    options = {} if method in package.BY_ERROR else {"step_size": 0.1, "interp": interp}
    if "adams" in method:
        options["max_order"] = 4
    kept = {}

    def pack(v):
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    # Within hooks "auto" keeps checkpoints
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v)
    with nullcontext() if adjoint == "auto" else hooks:
        ys = gf.odeint(net, y0, t.flip(0) if falls else t, method=method, options=options,
                       rtol=1e-3, atol=1e-4, adjoint=adjoint, memory_limit=limit)  # fmt: skip
    nfe = net.nfe
    parts = ys if is_tuple else (ys,)
    loss = sum((p * torch.linspace(0.5, 1.5, p.numel()).view_as(p)).sum() for p in parts)
    grads = torch.autograd.grad(loss, [*(y0 if is_tuple else (y0,)), *net.parameters()])
    return [*parts, *grads], (nfe, net.nfe - nfe), sum(kept.values())


@pytest.mark.filterwarnings("ignore:.*did not")  # corrections that do not settle
@pairwise(method=METHODS, adjoint=["auto", "checkpoint", "limited"], interp=["linear", "cubic"],
          falls=[False, True], is_tuple=[False, True])  # fmt: skip
def test_gradients_equal_the_direct_ones(method, adjoint, interp, falls, is_tuple):
    call = {"interp": interp, "falls": falls, "is_tuple": is_tuple}
    want, (forward, _), direct_bytes = solved("direct", method, **call)
    limit = LIMIT if adjoint == "limited" else None
    got, nfe, kept = solved("checkpoint" if limit else adjoint, method, limit=limit, **call)
    assert len(got) == len(want)
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(f"value {i}", ours, theirs, tolerance=1e-12)
    if adjoint == "auto" and interp == "linear":  # as direct, where there is room
        assert nfe == (forward, 0)
    elif adjoint != "auto":
        assert nfe[0] >= forward and nfe[1] > 0
        assert kept < direct_bytes and (limit is None or kept <= limit)


def test_callbacks_are_called_once_within_a_limit():
    net, heard = Net(), []
    net.callback_step = lambda t, y, dt: heard.append(("step", t.item()))
    net.callback_accept_step = lambda t, y, dt: heard.append(("accept", t.item()))
    y0, t = torch.randn(20, 3, dtype=F64, requires_grad=True), torch.tensor([0.0, 1.0], dtype=F64)
    counts = []
    for how in ({}, {"adjoint": "checkpoint", "memory_limit": LIMIT}):
        gf.odeint(net, y0, t, **how)[-1].sum().backward()
        counts.append(list(heard))
        heard.clear()
    assert counts[0] == counts[1] and len(counts[0]) > 4


def test_choices_that_do_not_go_together():
    y0, t = torch.ones(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    bad = [
        (ValueError, "`adjoint` must be one of auto, direct, checkpoint, got 'continuous'",
         {"adjoint": "continuous"}),
        (ValueError, "`memory_limit` must come with adjoint 'auto' or 'checkpoint'",
         {"memory_limit": 10**6}),
        (TypeError, "`memory_limit` must be an int or None, got float",
         {"adjoint": "checkpoint", "memory_limit": 1e6}),
        (NotImplementedError, "`adjoint` must be .* where method 'dopri8' is torchdiffeq's own",
         {"adjoint": "checkpoint", "method": "dopri8"}),
        (NotImplementedError, "`adjoint` must be .* where `y0` is complex.*, got a limit of 1000",
         {"adjoint": "auto", "memory_limit": 10**6, "y0": y0 + 0j}),
        (NotImplementedError, "`adjoint` must be .* where `step_t` is given",
         {"adjoint": "checkpoint", "options": {"step_t": torch.tensor([0.5])}}),
        (NotImplementedError, "`method` must be .* where `y0` is complex, got 'rk4_classic'",
         {"method": "rk4_classic", "y0": y0 + 0j}),
        (NotImplementedError, "`method` must be .* `t` requires a gradient, got 'ExplicitAdams'",
         {"method": ExplicitAdams(), "t": t.clone().requires_grad_()}),
    ]  # fmt: skip
    for error, text, call in bad:
        with pytest.raises(error, match=text):
            gf.odeint(**{"func": lambda t, y: -y, "y0": y0, "t": t, **call})


def test_each_method_has_its_options():
    assert all(package.is_known(method) for method in METHODS_OF_INTEGRATE)


def linear():
    graph, leaves = linear_problem()
    for leaf in leaves.values():
        leaf.requires_grad_()
    return graph, leaves, linear_term(graph, leaves)


@pytest.mark.parametrize("method", ["uniformisation", "semi_implicit_euler", "rk4_classic",
                                    Uniformisation(), SemiImplicitEuler(iterations=3),
                                    ImplicitAdams(), ExplicitAdams(max_order=5)],
                         ids=lambda m: m if isinstance(m, str) else type(m).__name__)  # fmt: skip
@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
def test_our_own_methods_by_fixed_steps(method, adjoint):
    """As `integrate` solves from one output time to the next."""
    _, leaves, term = linear()
    want = gf.integrate(term, leaves["x0"], 1.2, times=[0.0, 0.6, 1.2], method=method,
                        step_size=0.2, adjoint="direct").xs  # fmt: skip
    t = torch.tensor([0.5, 1.1, 1.7], dtype=F64)
    got = gf.odeint(term, leaves["x0"], t, method=method, options={"step_size": 0.2},
                    adjoint=adjoint)  # fmt: skip
    assert_close("states", got, want, tolerance=1e-9)
    for name, leaf in leaves.items():
        ours, theirs = (
            torch.autograd.grad(xs.square().sum(), leaf, retain_graph=True)[0] for xs in (got, want)
        )
        assert_close(name, ours, theirs, tolerance=1e-9)


def test_exact_steps_end_at_each_time():
    graph, leaves, term = linear()
    with torch.no_grad():
        a = dense(leaves["a"], graph) - torch.eye(12, dtype=F64)
        leaves["beta"].zero_()
        t = torch.tensor([0.0, 0.37, 5.0], dtype=F64)
        options = {"step_size": 3.0, "interp": "cubic"}
        got = gf.odeint(term, leaves["x0"], t, method="uniformisation", options=options)
        for time, x in zip(t, got, strict=True):
            exact = torch.matrix_exp(0.8 * time * a) @ leaves["x0"]
            assert_close(f"x({time:g})", x, exact, tolerance=1e-12)


def test_a_frozen_matrix():
    field, graph = nonlinear_problem()
    x = torch.randn(8, 4, dtype=F64)
    term = nonlinear_term(field, graph, x)
    t = torch.tensor([0.0, 0.4], dtype=F64)
    got = gf.odeint(term, x, t, method="semi_implicit_euler", options={"step_size": 0.1})
    want = gf.integrate(term, x, 0.4, method="semi_implicit_euler", step_size=0.1)
    assert_close("x", got[-1], want.x, tolerance=1e-12)


def test_a_pair_as_an_object():
    solver = EmbeddedRungeKutta(tableaux.DORMAND_PRINCE, rtol=1e-5, atol=1e-6)
    y0, t = torch.ones(3, dtype=F64), torch.tensor([0.0, 0.7, 1.0], dtype=F64)

    def f(t, y):
        return -y * torch.cos(t)

    got = gf.odeint(f, y0, t, method=solver, options={"max_step": 0.2})
    want = gf.odeint(f, y0, t, rtol=1e-5, atol=1e-6, options={"max_step": 0.2})
    assert torch.equal(got, want)
    with pytest.warns(UserWarning, match="EmbeddedRungeKutta: Unexpected arguments .'norm'"):
        gf.odeint(f, y0, t, method=solver, options={"norm": torch.linalg.norm})


@pytest.mark.parametrize("method", ["semi_implicit_euler", "uniformisation"])
def test_methods_that_want_a_matrix(method):
    _, leaves, term = linear()
    x, t = leaves["x0"].detach(), torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.raises(TypeError, match="`func` must be a term with a matrix .*, got function"):
        gf.odeint(lambda t, x: -x, x, t, method=method)
    with pytest.raises(TypeError, match="`func` must be a term .*, got a tuple for `y0`"):
        gf.odeint(term, (x, x), t, method=method)
    with pytest.raises(ValueError, match="`t` must rise for"):
        gf.odeint(term, x, t.flip(0), method=method)
    with pytest.raises(ValueError, match="`adjoint_method` must be a method for any f"):
        gf.odeint_adjoint(term, x, t, method=method, adjoint_params=())
    with pytest.warns(UserWarning, match="Unexpected arguments .'perturb': True"):
        gf.odeint(term, x, t, method=method, options={"perturb": True})
    with pytest.raises(TypeError, match="`method` must be a name or None, got Uniformisation"):
        gf.odeint_adjoint(term, x, t, method=Uniformisation(), adjoint_params=())
    solved = gf.odeint_adjoint(term, x, t, method=method, adjoint_method="dopri5",
                               adjoint_params=(leaves["a"],))  # fmt: skip
    (got,) = torch.autograd.grad(solved[-1].sum(), leaves["a"])
    exact = gf.odeint(term, x, t, rtol=1e-9, atol=1e-10)[-1].sum()
    tolerance = 1e-6 if method == "uniformisation" else 0.5
    assert_close("da", got, torch.autograd.grad(exact, leaves["a"])[0], tolerance=tolerance)


def test_rk4_classic_in_both_solves_of_the_adjoint(recwarn):
    x, t = torch.ones(3, dtype=F64, requires_grad=True), torch.tensor([0.0, 1.0], dtype=F64)
    options = {"step_size": 0.05}
    ys = gf.odeint_adjoint(lambda t, y: -y, x, t, method="rk4_classic", options=options,
                           adjoint_params=())  # fmt: skip
    (dx,) = torch.autograd.grad(ys[-1].sum(), x)
    assert_close("dx", dx, torch.exp(-torch.ones(3, dtype=F64)), tolerance=1e-6)
    assert not recwarn


@pytest.mark.parametrize("is_tuple", [False, True])
def test_the_norm_of_the_adjoint_is_found_and_replaced_as_torchdiffeqs(is_tuple):
    x = torch.ones(2, 2, dtype=F64, requires_grad=True)
    y0 = (x, torch.ones(3, dtype=F64)) if is_tuple else x
    params = (torch.ones(7, dtype=F64, requires_grad=True),)
    ys = gf.odeint_adjoint(lambda t, y: y, y0, torch.tensor([0.0, 1.0]), adjoint_params=params)
    node = ys[0].grad_fn.next_functions[0][0].next_functions[0][0] if is_tuple else ys.grad_fn
    norm, shapes = node.adjoint_options["norm"], []

    def spy(state):
        shapes.append([tuple(part.shape) for part in state])
        return norm(state)

    node.adjoint_options["norm"] = spy
    (ys[0] if is_tuple else ys).sum().backward()
    size = (7,) if is_tuple else (2, 2)
    assert shapes and shapes[0] == [(), size, size, (7,)]
