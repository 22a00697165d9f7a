"""Uniformisation: exactness, the weights, gradients, and what it refuses."""

import math

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import scipy.stats
import torch

import grand_fast as gf
from grand_fast.nn.terms import LinearDiffusion
from grand_fast.solvers import Combination, Uniformisation
from grand_fast.solvers.methods.uniformisation import poisson_weights
from grand_fast.testing import assert_close
from tests.solvers._terms import ADJOINTS, dense, linear_problem, linear_term, row_stochastic


def exponential(a, x0, T, alpha, beta, source):
    """`x(T)` by the exponential of the dense field, the source as a constant part of the state."""
    n = len(x0)
    eye = torch.eye(n, dtype=x0.dtype)
    above = torch.cat([alpha * (a - eye), beta * eye], dim=1)
    field = torch.cat([above, torch.zeros(n, 2 * n, dtype=x0.dtype)])
    return (torch.linalg.matrix_exp(T * field) @ torch.cat([x0, source]))[:n]


def cora_like(d=4):
    """A random graph of Cora's size: nodes and, with loops, directed edges."""
    n, edges = 2485, 10138
    index = torch.cat([torch.randint(0, n, (2, edges)), torch.arange(n).repeat(2, 1)], dim=1)
    graph = gf.Graph.from_edge_index(index, n)
    return graph, row_stochastic(graph), torch.randn(n, d, dtype=torch.float64)


@pytest.mark.parametrize(("T", "alpha"), [(0.01, 1.0), (1.0, 0.5), (18.2948, 0.97), (100.0, 1.0)])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_agrees_with_scipy(T, alpha, beta):
    graph, a, x0 = cora_like()
    source = torch.randn_like(x0)
    term = LinearDiffusion(a, graph, alpha=alpha, beta=beta, x0=source)
    got = gf.integrate(term, x0, T, method="uniformisation").x
    csr = (a.numpy(), graph.col.numpy(), graph.rowptr.numpy())
    n = graph.num_nodes
    eye = scipy.sparse.identity(n, format="csr")
    field = alpha * (scipy.sparse.csr_matrix(csr, shape=(n, n)) - eye)
    both = scipy.sparse.bmat([[field, beta * eye], [None, 0 * eye]], format="csr")
    state = np.concatenate([x0.numpy(), source.numpy()])
    want = scipy.sparse.linalg.expm_multiply(T * both, state, traceA=T * both.trace())[:n]
    assert_close("x(T)", got, torch.from_numpy(want), tolerance=1e-12)


@pytest.mark.parametrize("q", [1e-9, 1e-3, 0.3, 1.0, 18.3, 700.0, 1e4])
@pytest.mark.parametrize("tol", [1e-16, 1e-7])
def test_weights(q, tol):
    weights, of_source = (np.array(w) for w in poisson_weights(q, tol))
    k = np.arange(len(weights))
    assert abs(weights.sum() - 1) < 1e-14 and weights.min() >= 0 and of_source.min() >= 0
    # scipy's own values are right to about q times the rounding unit
    assert np.abs(weights - scipy.stats.poisson.pmf(k, q)).max() < tol + 1e-14 + 1e-16 * q
    assert abs((k * weights).sum() / q - 1) < 1e-13 + 2 * tol
    assert abs(of_source.sum() - 1) < 1e-13 + 2 * tol
    assert np.abs(q * of_source - scipy.stats.poisson.sf(k, q)).max() < 2 * tol + 1e-13 + 1e-16 * q
    shorter = len(weights) - 2  # the least number of terms: one less leaves out more than tol
    left_out = scipy.stats.poisson.sf(np.arange(shorter, shorter + 400), q)
    assert max(left_out[0], left_out.sum() / q) > tol


def test_weights_without_time():
    assert poisson_weights(0.0, 1e-16) == ((1.0,), (1.0,))
    assert poisson_weights(1e-310, 1e-16) == ((1.0,), (1.0,))


@pytest.mark.parametrize(("T", "tol", "products"), [(18.3, 3e-7, 43), (18.3, 1e-2, 30)])
def test_products_are_known_beforehand(T, tol, products):
    graph, leaves = linear_problem()
    term = LinearDiffusion(leaves["a"], graph, alpha=1.0, beta=None, x0=None)
    solution = gf.integrate(term, leaves["x0"], T, method=Uniformisation(tol=tol))
    assert solution.stats.nfe == len(poisson_weights(T, tol)[0]) - 1
    assert abs(solution.stats.nfe - products) <= 1


@pytest.mark.parametrize("kind", ["loops", "empty_rows", "hub", "repeated", "no_edges", "single"])
def test_agrees_with_the_exponential(kind, backend):
    graph, leaves = linear_problem(kind, n=1 if kind == "single" else 12)
    with gf.backend(backend):
        got = gf.integrate(linear_term(graph, leaves), leaves["x0"], 7.0, method="uniformisation")
    a = dense(leaves.pop("a"), graph)
    assert_close("x(T)", got.x, exponential(a, T=7.0, **leaves), tolerance=1e-12)


def test_steps_change_nothing():
    graph, leaves = linear_problem()
    term, x0 = linear_term(graph, leaves), leaves["x0"]
    once = gf.integrate(term, x0, 5.0, method="uniformisation")
    steps = gf.integrate(term, x0, 5.0, method="uniformisation", step_size=0.7)
    assert (once.stats.accepted, steps.stats.accepted) == (1, 8)
    assert_close("x(T)", steps.x, once.x, tolerance=1e-14)


def test_output_times_are_exact():
    graph, leaves = linear_problem()
    term, x0 = linear_term(graph, leaves), leaves["x0"]
    times = [0.0, 0.31, 2.0, 4.4]
    solution = gf.integrate(term, x0, 5.0, method="uniformisation", times=times, step_size=2.0)
    assert solution.stats.accepted == 5  # to 0.31, 2, 4, 4.4 and 5
    for t, x in zip(times, solution.xs, strict=True):
        want = gf.integrate(term, x0, t, method="uniformisation").x
        assert_close(f"x({t})", x, want, tolerance=1e-14)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("step_size", [None, 1.1])
def test_gradients(adjoint, step_size):
    graph, leaves = linear_problem(n=6)

    def solve(*values):
        term = linear_term(graph, dict(zip(leaves, values, strict=True)))
        return gf.integrate(
            term, values[0], 2.5, method="uniformisation", step_size=step_size, adjoint=adjoint
        ).x

    values = [v.clone().requires_grad_() for v in leaves.values()]
    assert torch.autograd.gradcheck(solve, values, atol=1e-8, rtol=1e-6, fast_mode=True)


def test_the_continuous_adjoint_runs_dopri5_backwards():
    graph, leaves = linear_problem()
    values = {name: v.clone().requires_grad_() for name, v in leaves.items()}
    options = gf.solvers.ContinuousOptions(rtol=1e-10, atol=1e-10)
    grads = []
    for kind in ({"adjoint": "direct"}, {"adjoint": "continuous", "adjoint_options": options}):
        term = linear_term(graph, values)
        x = gf.integrate(term, values["x0"], 2.5, method="uniformisation", **kind).x
        grads.append(torch.autograd.grad(x.square().sum(), list(values.values())))
    for name, direct, continuous in zip(values, *grads, strict=True):
        assert_close(name, continuous, direct, tolerance=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 1e-12, 3e-9, 1e-6, 1e-3, 0.7, 5.0])
@pytest.mark.parametrize("beta", ["float", "scalar", "channels"])
def test_gradients_at_every_size_of_alpha(alpha, beta):
    """Against autograd through the matrix exponential."""
    graph, leaves = linear_problem(n=6)
    T = 2.5
    kinds = {"float": 0.3, "scalar": leaves["beta"], "channels": torch.tensor([0.3, -1.0, 0.0])}
    leaves |= {"alpha": torch.tensor(alpha, dtype=torch.float64), "beta": kinds[beta]}
    tensors = [name for name in leaves if isinstance(leaves[name], torch.Tensor)]
    upstream = torch.randn_like(leaves["x0"])
    grads = []
    for exact in (False, True):
        values = {k: v.double().clone().requires_grad_() if k in tensors else v
                  for k, v in leaves.items()}  # fmt: skip
        if exact:
            a = dense(values["a"], graph)
            alpha_ = values["alpha"]
            columns = [
                exponential(a, values["x0"][:, [c]], T, alpha_, b, values["source"][:, [c]])
                for c, b in enumerate(
                    torch.as_tensor(values["beta"], dtype=torch.float64).expand(3)
                )
            ]
            x = torch.cat(columns, dim=1)
        else:
            x = gf.integrate(linear_term(graph, values), values["x0"], T, method="uniformisation").x
        inputs = [values[k] for k in tensors]
        grads.append(torch.autograd.grad(x, inputs, upstream, materialize_grads=True))
    for name, got, want in zip(tensors, *grads, strict=True):
        # That by alpha is right to √eps near alpha T = √eps; that by `a` is as small as alpha T,
        # of which eps is left out.
        is_small = name in ("alpha", "a") and alpha < 1e-5
        tolerance = 1e-7 if is_small else 1e-11
        assert_close(name, got, want, tolerance=tolerance)


def test_a_term_whose_fused_step_wants_a_base():
    graph, leaves = linear_problem(n=6)
    leaves["alpha"].requires_grad_()

    class Fused(LinearDiffusion):
        def vf(self, t, x):
            return LinearDiffusion.axpy(self, t, x, Combination([]), 1.0)

        def axpy(self, t, x, base, tau):
            return base.evaluate() + tau * self.vf(t, x)

    grads = []
    for kind in (LinearDiffusion, Fused):
        term = kind(leaves["a"], graph, alpha=leaves["alpha"], beta=0.3, x0=leaves["source"])
        x = gf.integrate(term, leaves["x0"], 2.5, method="uniformisation").x
        grads.append(torch.autograd.grad(x.square().sum(), leaves["alpha"])[0])
    assert_close("dalpha", grads[1], grads[0], tolerance=1e-14)


@pytest.mark.parametrize("T", [0.5, 18.3, 300.0])
def test_maximum_principle(T):
    graph, a, x0 = cora_like()
    term = LinearDiffusion(a, graph, alpha=1.0, beta=None, x0=None)
    x = gf.integrate(term, x0, T, method="uniformisation").x
    rounding = 1e-14 * x0.abs().max()
    assert bool((x <= x0.amax(0) + rounding).all() and (x >= x0.amin(0) - rounding).all())
    ones = gf.integrate(term, torch.ones_like(x0), T, method="uniformisation").x
    assert_close("a constant state", ones, torch.ones_like(x0), tolerance=1e-13)


@pytest.mark.parametrize("alpha", [0.0, torch.tensor(0.0, dtype=torch.float64)])
def test_without_diffusion_the_source_adds_up(alpha):
    graph, leaves = linear_problem()
    term = LinearDiffusion(leaves["a"], graph, alpha=alpha, beta=0.3, x0=leaves["source"])
    got = gf.integrate(term, leaves["x0"], 4.0, method="uniformisation").x
    assert_close("x(T)", got, leaves["x0"] + 1.2 * leaves["source"], tolerance=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype):
    graph, a, x0 = cora_like()
    want = gf.integrate(
        LinearDiffusion(a, graph, alpha=1.0, beta=0.1, x0=x0), x0, 5.0, method="uniformisation"
    ).x
    x0 = x0.to(dtype)
    term = LinearDiffusion(a.to(dtype), graph, alpha=1.0, beta=0.1, x0=x0)
    got = gf.integrate(term, x0, 5.0, method="uniformisation").x
    # Each of the products rounds the state once.
    assert_close("x(T)", got, want, tolerance=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("variant", ["l", "laplacian"])
def test_a_model_trains_with_it(variant):
    x, edges = torch.randn(30, 5), torch.randint(0, 30, (2, 150))
    model = gf.nn.GRAND(
        5, 8, 3, variant=variant, method="uniformisation", T=6.0, step_size=None, source=True
    )
    model(x, edges).square().sum().backward()
    assert model.status is gf.Status.SUCCESS
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_alpha_that_is_not_a_number_is_a_status():
    graph, leaves = linear_problem()
    leaves["alpha"] = torch.tensor(math.nan)
    solution = gf.integrate(linear_term(graph, leaves), leaves["x0"], 1.0, method="uniformisation")
    assert solution.status is gf.Status.NON_FINITE


def test_refuses_attention_that_changes():
    graph = gf.Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 2)
    model = gf.nn.GRAND(3, 4, 2, variant="nl", method="uniformisation")
    with pytest.raises(TypeError, match=r"linear.*got NonlinearDiffusion.*variant='l'"):
        model(torch.randn(2, 3), graph)
    with pytest.raises(TypeError, match="linear.*got FunctionTerm"):
        gf.integrate(lambda t, x: -x, torch.ones(3), 1.0, method="uniformisation")


def test_refuses_what_it_cannot_average():
    graph, leaves = linear_problem()
    x0 = leaves["x0"]
    leaves["alpha"] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"`alpha`.*got \[3\].*semi_implicit_euler"):
        gf.integrate(linear_term(graph, leaves), x0, 1.0, method="uniformisation")
    leaves["alpha"] = -0.5
    with pytest.raises(ValueError, match=r"`alpha` must be at least 0.*got -0\.5"):
        gf.integrate(linear_term(graph, leaves), x0, 1.0, method="uniformisation")
    with pytest.raises(ValueError, match="`tol`.*got 0"):
        Uniformisation(tol=0)
