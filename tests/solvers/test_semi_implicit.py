"""Semi-implicit Euler: the solution of equation 8, its gradients, and the linear solvers."""

import logging
import math

import pytest
import torch

import grand_fast as gf
from grand_fast.nn.terms import LinearDiffusion, NonlinearDiffusion
from grand_fast.solvers import SemiImplicitEuler
from grand_fast.testing import assert_close, random_graph
from tests._pairwise import pairwise
from tests.conftest import BACKENDS
from tests.solvers._terms import (
    ADJOINTS,
    dense,
    linear_problem,
    linear_term,
    nonlinear_problem,
    row_stochastic,
)

TIGHT = {
    "fixed_point": SemiImplicitEuler(tol=1e-13, linear_solver="fixed_point"),
    "bicgstab": SemiImplicitEuler(tol=1e-13, linear_solver="bicgstab"),
    "iterations": SemiImplicitEuler(iterations=4),
}
SOLVED = ("fixed_point", "bicgstab")
CHANNELS = torch.tensor([0.1, 0.8, 2.0], dtype=torch.float64)


def exact_step(a, x, tau, alpha, beta=0.0, source=0.0):
    """Equation 8 with a source, channel by channel."""
    alphas = torch.as_tensor(alpha, dtype=x.dtype).expand(x.shape[1])
    eye = torch.eye(len(x), dtype=x.dtype)
    right = x + tau * beta * source
    columns = [
        torch.linalg.solve((1 + tau * s) * eye - tau * s * a, right[:, c])
        for c, s in enumerate(alphas)
    ]
    return torch.stack(columns, dim=1)


@pairwise(
    kind=["loops", "empty_rows", "hub", "repeated", "no_edges", "single"],
    tau=[0.1, 3.0, 50.0],
    solver=SOLVED,
    backend=BACKENDS,
)
def test_solves_equation_8(solver, kind, tau, backend):
    graph, leaves = linear_problem(kind, n=1 if kind == "single" else 12)
    with gf.backend(backend):
        got = gf.integrate(linear_term(graph, leaves), leaves["x0"], tau, method=TIGHT[solver]).x
    want = exact_step(
        dense(leaves["a"], graph), leaves["x0"], tau, leaves["alpha"], leaves["beta"],
        leaves["source"],
    )  # fmt: skip
    assert_close("x", got, want, tolerance=1e-11)


@pairwise(
    alpha={"zero": 0.0, "float": 0.8, "channels": CHANNELS},
    beta={"none": None, "float": 0.3, "channels": CHANNELS},
    solver=SOLVED,
)
def test_scales_may_be_floats_or_channels(solver, alpha, beta):
    graph, leaves = linear_problem()
    source = None if beta is None else leaves["source"]
    term = LinearDiffusion(leaves["a"], graph, alpha=alpha, beta=beta, x0=source)
    got = gf.integrate(term, leaves["x0"], 4.0, method=TIGHT[solver]).x
    beta = 0.0 if beta is None else beta
    want = exact_step(dense(leaves["a"], graph), leaves["x0"], 4.0, alpha, beta, leaves["source"])
    assert_close("x", got, want, tolerance=1e-11)


@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize("learned", [False, True])
def test_iterates_are_the_recurrence(iterations, learned):
    graph, leaves = linear_problem()
    alpha = leaves["alpha"] if learned else float(leaves["alpha"])
    term = LinearDiffusion(
        leaves["a"], graph, alpha=alpha, beta=leaves["beta"], x0=leaves["source"]
    )
    solver = SemiImplicitEuler(iterations=iterations)
    solution = gf.integrate(term, leaves["x0"], 4.5, step_size=1.5, method=solver)
    assert solution.stats == gf.Stats(nfe=3 * iterations, accepted=3, rejected=0)
    a, x, s = dense(leaves["a"], graph), leaves["x0"], 1.5 * float(alpha)
    for _ in range(3):
        y = x
        for _ in range(iterations):
            y = (x + s * a @ y + 1.5 * leaves["beta"] * leaves["source"]) / (1 + s)
        x = y
    assert_close("x", solution.x, x, tolerance=1e-13)


@pairwise(solver=list(TIGHT), adjoint=ADJOINTS, alpha=["scalar", "channels"])
def test_gradients_of_a_linear_term(adjoint, solver, alpha):
    graph, leaves = linear_problem(n=5, d=3)
    if alpha == "channels":
        leaves["alpha"], leaves["beta"] = CHANNELS, CHANNELS.flip(0)

    def solve(*values):
        term = linear_term(graph, dict(zip(leaves, values, strict=True)))
        return gf.integrate(
            term, values[0], 5.0, step_size=2.5, method=TIGHT[solver], adjoint=adjoint
        ).x

    values = [v.clone().requires_grad_() for v in leaves.values()]
    fast = (adjoint, alpha) != ("direct", "scalar")  # along random directions
    assert torch.autograd.gradcheck(solve, values, atol=1e-7, rtol=1e-5, fast_mode=fast)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", TIGHT)
def test_gradients_of_attention(adjoint, solver):
    field, graph = nonlinear_problem(n=4, d=2)
    names = [name for name, _ in field.named_parameters()]
    x0 = torch.randn(graph.num_nodes, field.channels, dtype=torch.float64)

    def solve(x, source, *parameters):
        def run(module):
            term = NonlinearDiffusion(module, graph, source)
            return gf.integrate(
                term, x, 5.0, step_size=2.5, method=TIGHT[solver], adjoint=adjoint
            ).x

        return call_with(field, dict(zip(names, parameters, strict=True)), run)

    leaves = [x0, torch.randn_like(x0), *(p.detach() for p in field.parameters())]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    fast = adjoint != "direct"
    assert torch.autograd.gradcheck(solve, leaves, atol=1e-7, rtol=1e-5, fast_mode=fast)


def call_with(module, parameters, run):
    """`run(module)` with other parameters, which stay: backward may run it again."""
    for name, value in parameters.items():
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        part._parameters.pop(leaf, None)
        setattr(part, leaf, value)
    return run(module)


@pytest.mark.parametrize("solver", TIGHT)
def test_checkpoint_gradients_equal_direct(solver):
    field, graph = nonlinear_problem(n=40, d=8)
    x0 = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for adjoint in ADJOINTS:
        term = NonlinearDiffusion(field, graph, x0)
        x = gf.integrate(term, x0, 6.0, step_size=2.0, method=TIGHT[solver], adjoint=adjoint).x
        grads.append(torch.autograd.grad(x.square().sum(), [x0, *field.parameters()]))
    for direct, checkpointed in zip(*grads, strict=True):
        assert_close("gradient", checkpointed, direct, tolerance=1e-14)


def test_gradients_within_a_memory_limit_equal_direct():
    graph, leaves = linear_problem(n=40, d=8)
    values = {name: v.clone().requires_grad_() for name, v in leaves.items()}
    grads = []
    for options in ({"adjoint": "direct"}, {"memory_limit": 40_000}):
        x = gf.integrate(
            linear_term(graph, values), values["x0"], 24.0, step_size=2.0,
            method=SemiImplicitEuler(), **options,
        ).x  # fmt: skip
        grads.append(torch.autograd.grad(x.square().sum(), list(values.values())))
    for name, direct, limited in zip(values, *grads, strict=True):
        assert_close(name, limited, direct, tolerance=1e-13)


@pytest.mark.parametrize("solver", TIGHT)
def test_checkpoint_keeps_one_state_a_step(solver):
    field, graph = nonlinear_problem(n=40, d=16)
    x0 = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    steps = 6
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        term = NonlinearDiffusion(field, graph, x0)
        gf.integrate(term, x0, float(steps), step_size=1.0, method=TIGHT[solver])
    assert sum(saved.values()) <= (steps + 1) * x0.numel()


def test_order_of_convergence():
    graph, leaves = linear_problem()
    term = linear_term(graph, leaves)
    x0, T = leaves["x0"], 2.0
    field = leaves["alpha"] * (dense(leaves["a"], graph) - torch.eye(len(x0), dtype=x0.dtype))
    eye = torch.eye(len(x0), dtype=x0.dtype) * leaves["beta"]
    both = torch.cat([torch.cat([field, eye], 1), torch.zeros(len(x0), 2 * len(x0))], 0)
    want = (torch.linalg.matrix_exp(both * T) @ torch.cat([x0, leaves["source"]]))[: len(x0)]
    errors = []
    for n in (16, 32, 64):
        method = SemiImplicitEuler(tol=1e-12)
        x = gf.integrate(term, x0, T, step_size=T / n, method=method).x
        errors.append(float((x - want).norm()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 1) < 0.2 for order in orders), orders


def test_order_of_convergence_with_attention():
    field, graph = nonlinear_problem()
    x0 = torch.randn(graph.num_nodes, field.channels, dtype=torch.float64)
    term, T = NonlinearDiffusion(field, graph, x0), 2.0
    want = gf.integrate(term, x0, T, method="dopri5", rtol=1e-12, atol=1e-12).x
    errors = []
    for n in (16, 32, 64):
        method = SemiImplicitEuler(tol=1e-12)
        x = gf.integrate(term, x0, T, step_size=T / n, method=method).x
        errors.append(float((x - want).detach().norm()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 1) < 0.2 for order in orders), orders


@pytest.mark.parametrize("stiffness", [0.5, 2.0, 5.0, 20.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tolerance_bounds_the_residual(stiffness, dtype):
    graph = random_graph("random", 200)
    a = row_stochastic(graph, dtype=dtype)
    x0 = torch.randn(200, 8, dtype=dtype)
    term = LinearDiffusion(a, graph, alpha=1.0, beta=None, x0=None)
    for choice in ("auto", "fixed_point", "bicgstab"):
        solver = SemiImplicitEuler(tol=1e-5, linear_solver=choice)
        y = gf.integrate(term, x0, stiffness, method=solver).x.double()
        ay = dense(a, graph).double() @ y
        residual = (1 + stiffness) * y - stiffness * ay - x0
        attainable = torch.finfo(dtype).eps * (1 + stiffness)
        assert float(residual.norm() / x0.norm()) < max(1.1e-5, attainable), choice


def test_large_steps_take_fewer_products_with_bicgstab():
    graph = random_graph("random", 400)
    x0 = torch.randn(400, 4, dtype=torch.float64)
    term = LinearDiffusion(row_stochastic(graph), graph, alpha=1.0, beta=None, x0=None)
    products = {
        choice: gf.integrate(
            term, x0, 50.0, method=SemiImplicitEuler(linear_solver=choice)
        ).stats.nfe
        for choice in ("auto", "fixed_point", "bicgstab")
    }
    assert products["auto"] == products["bicgstab"] < products["fixed_point"] / 3


def test_a_breakdown_falls_back_to_the_fixed_point():
    """The residual is orthogonal to its image: BiCGSTAB cannot take its first step."""
    graph = gf.Graph.from_edge_index(torch.tensor([[1, 0], [0, 1]]), 2)
    tau = 10.0
    u = tau / (1 + tau)
    a = torch.tensor([1.5, 0.5], dtype=torch.float64) / u
    m = torch.eye(2, dtype=torch.float64) - u * dense(a, graph)
    ones = torch.ones(2, 1, dtype=torch.float64)
    assert abs(float(ones.T @ m @ ones)) < 1e-15
    x0 = torch.linalg.solve(torch.eye(2, dtype=torch.float64) / (1 + tau) - m, ones)
    term = LinearDiffusion(a, graph, alpha=1.0, beta=None, x0=None)
    got = gf.integrate(term, x0, tau, method=TIGHT["bicgstab"]).x
    assert_close("x", got, torch.linalg.solve(m, x0 / (1 + tau)), tolerance=1e-11)


def test_what_cannot_converge_is_a_warning(caplog):
    graph = random_graph("loops", 12)
    a = 5 * row_stochastic(graph)
    x0 = torch.ones(12, 1, dtype=torch.float64)
    term = LinearDiffusion(a, graph, alpha=1.0, beta=None, x0=None)
    with caplog.at_level(logging.WARNING, logger="grand_fast"):
        solution = gf.integrate(
            term, x0, 9.0, method=SemiImplicitEuler(linear_solver="fixed_point")
        )
    assert "times its tolerance" in caplog.text and solution.stats.accepted == 1


def test_a_state_that_is_not_finite_is_a_status():
    graph, leaves = linear_problem()
    x0 = leaves["x0"].clone()
    x0[3, 1] = float("nan")
    for solver in ("auto", "bicgstab"):
        method = SemiImplicitEuler(linear_solver=solver)
        solution = gf.integrate(linear_term(graph, leaves), x0, 5.0, method=method)
        assert solution.status is gf.Status.NON_FINITE


@pytest.mark.parametrize("iterations", [None, 3])
@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_an_alpha_that_is_not_a_number_is_a_status(alpha, iterations):
    graph, leaves = linear_problem()
    leaves["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    method = SemiImplicitEuler(iterations=iterations)
    solution = gf.integrate(linear_term(graph, leaves), leaves["x0"], 1.0, method=method)
    assert solution.status is gf.Status.NON_FINITE


@pytest.mark.parametrize("iterations", [None, 3])
def test_refuses_to_sharpen(iterations):
    graph, leaves = linear_problem()
    leaves["alpha"] = -1.0
    method = SemiImplicitEuler(iterations=iterations)
    with pytest.raises(ValueError, match=r"`alpha` must be at least 0.*got tau · alpha = -1\."):
        gf.integrate(linear_term(graph, leaves), leaves["x0"], 1.0, method=method)


def test_a_state_of_zeros_stays():
    graph, leaves = linear_problem()
    term = LinearDiffusion(leaves["a"], graph, alpha=1.0, beta=None, x0=None)
    x = gf.integrate(term, torch.zeros_like(leaves["x0"]), 5.0, method="semi_implicit_euler").x
    assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("variant", ["l", "nl", "laplacian"])
def test_a_model_trains_with_it(variant):
    graph = random_graph("loops", 30)
    model = gf.nn.GRAND(
        5, 8, 3, variant=variant, method="semi_implicit_euler", T=6.0, step_size=3.0, source=True
    )
    logits = model(torch.randn(30, 5), graph)
    logits.square().sum().backward()
    assert model.status is gf.Status.SUCCESS
    used = dict(model.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used.values())


def test_a_function_has_no_matrix():
    with pytest.raises(TypeError, match=r"`term`.*semi_implicit_euler, got FunctionTerm.*rk4"):
        gf.integrate(lambda t, x: -x, torch.ones(3), 1.0, method="semi_implicit_euler")


@pytest.mark.parametrize(("options", "text"), [
    ({"iterations": 0}, "`iterations`.*at least 1, got 0"),
    ({"iterations": True}, "`iterations`.*got True"),
    ({"tol": 0.0}, "`tol`.*between 0 and 1, got 0.0"),
    ({"linear_solver": "gmres"}, "`linear_solver`.*auto, fixed_point, bicgstab, got 'gmres'"),
    ({"iterations": 3, "linear_solver": "bicgstab"}, "`iterations`.*fixed point"),
])  # fmt: skip
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        SemiImplicitEuler(**options)
