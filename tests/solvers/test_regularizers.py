"""Penalties of a solve: against dense Jacobians, exact integrals, and each other's gradients."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian
from torch.multiprocessing.reductions import StorageWeakRef

import grand_fast as gf
from grand_fast.solvers import METHODS, AbstractTerm
from grand_fast.solvers.regularizers import REGULARIZERS, RegularizedTerm
from grand_fast.testing import assert_close
from tests.solvers._terms import linear_problem, linear_term, nonlinear_problem, nonlinear_term

GENERAL = [name for name, make in METHODS.items() if not make(1e-6, 1e-6).wants_matrix]
TIGHT = {"method": "dopri5", "rtol": 1e-10, "atol": 1e-12}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_field(n=3, d=2, seed=0):
    """`f = Mx` on states `[n, d]`, and M `[nd, nd]`, of which no eigenvalue is positive."""
    torch.manual_seed(seed)
    m = 0.3 * torch.randn(n * d, n * d, dtype=torch.float64) - torch.eye(n * d)
    return lambda t, x: (m @ x.flatten()).view_as(x), m


def nonlinear(n=6, d=4):
    field, graph = nonlinear_problem(n, d)
    x0 = torch.randn(n, d, dtype=torch.float64)
    return field, graph, x0


def solve(term, x0, T=1.0, names=REGULARIZERS, **options):
    solution = gf.integrate(term, x0, T, regularizers=names, generator=seeded(), **options)
    assert solution.status is gf.Status.SUCCESS
    assert list(solution.penalties) == list(names)
    assert all(p.shape == x0.shape[:1] and p.dtype == x0.dtype for p in solution.penalties.values())
    return solution


def values(solution):
    return torch.cat([solution.x.flatten(), *solution.penalties.values()])


def probe_of(x0):
    return RegularizedTerm(nonlinear, ("jacobian",), x0, seeded()).probe


def test_rates_are_those_of_the_dense_jacobian():
    field, graph, x0 = nonlinear()
    term, eps = nonlinear_term(field, graph, x0), probe_of(x0)
    n, d = x0.shape
    j = jacobian(lambda x: term.vf(0.0, x), x0).view(n * d, n * d)
    f = term.vf(0.0, x0)
    pulled, along = (j.T @ eps.flatten()).view(n, d), (j.T @ f.flatten()).view(n, d)
    want = {
        "kinetic": 0.5 * f.square().mean(1),
        "directional": 0.5 * along.square().mean(1),
        "jacobian": pulled.square().sum(1),
        "divergence": (eps * pulled).sum(1),
    }
    got = solve(term, x0, T=0.25, method="euler").penalties  # one step: 0.25 of the rate
    for name in REGULARIZERS:
        assert_close(name, got[name], 0.25 * want[name], tolerance=1e-12)


@pytest.mark.parametrize("method", GENERAL)
def test_constant_rates_are_integrated_exactly(method):
    f, m = linear_field()
    x0 = torch.randn(3, 2, dtype=torch.float64)
    eps = probe_of(x0).flatten()
    options = {"method": method, "step_size": 0.2, "rtol": 1e-2, "atol": 1e-3}
    got = solve(f, x0, T=1.7, **options).penalties
    want = 1.7 * (m.T @ eps).square().view(3, 2).sum(1)
    assert_close("jacobian", got["jacobian"], want, tolerance=1e-12)
    want = 1.7 * (eps * (m.T @ eps)).view(3, 2).sum(1)
    assert_close("divergence", got["divergence"], want, tolerance=1e-12)


def test_the_mean_over_all_probes_is_the_norm_and_the_trace():
    f, m = linear_field()
    x0 = torch.randn(3, 2, dtype=torch.float64)
    term = RegularizedTerm(_function(f), ("jacobian", "divergence"), x0, None)
    sums = []
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        term.probe = torch.tensor(signs, dtype=torch.float64).view(3, 2)
        rates = term.vf(0.0, term.join(x0))[6:]
        sums.append(rates.view(2, 3).sum(1))
    squared, trace = torch.stack(sums).mean(0)
    assert_close("‖J‖²", squared, m.square().sum(), tolerance=1e-12)
    assert_close("trace", trace, m.trace(), tolerance=1e-12)


def test_kinetic_and_directional_against_exact_integrals():
    f, m = linear_field()
    x0 = torch.randn(3, 2, dtype=torch.float64)
    got = solve(f, x0, T=2.0, **TIGHT).penalties
    nodes, weights = np.polynomial.legendre.leggauss(24)  # on [-1, 1], T = 2
    kinetic, directional = torch.zeros(3), torch.zeros(3)
    for node, weight in zip(nodes, weights, strict=True):
        slope = m @ torch.linalg.matrix_exp((node + 1) * m) @ x0.flatten()
        kinetic = kinetic + weight * 0.5 * slope.square().view(3, 2).mean(1)
        directional = directional + weight * 0.5 * (m.T @ slope).square().view(3, 2).mean(1)
    assert_close("kinetic", got["kinetic"], kinetic, tolerance=1e-9)
    assert_close("directional", got["directional"], directional, tolerance=1e-9)


def _function(f):
    class Term(AbstractTerm):
        def vf(self, t, x):
            return f(t, x)

    return Term()


ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4, "rk4_classic": 4, "explicit_adams": 4}


@pytest.mark.parametrize("method", ORDERS)
def test_penalties_converge_as_the_state_does(method):
    field, graph, x0 = nonlinear()
    term = nonlinear_term(field, graph, x0)
    with torch.no_grad():
        exact = values(solve(term, x0, T=2.0, **TIGHT))
        errors = []
        for steps in (16, 32, 64):
            x = values(solve(term, x0, T=2.0, method=method, step_size=2.0 / steps))
            errors.append(float((x - exact)[x0.numel() :].norm()))
    slope = np.polyfit(np.log([1 / 16, 1 / 32, 1 / 64]), np.log(errors), 1)[0]
    assert abs(slope - ORDERS[method]) < 0.2, errors


@pytest.mark.parametrize("method", GENERAL)
def test_checkpoint_equals_direct_at_the_same_number_of_evaluations(method):
    field, graph, x0 = nonlinear()
    grads, work = [], []
    for adjoint in ("direct", "checkpoint"):
        x = x0.clone().requires_grad_()
        solution = solve(nonlinear_term(field, graph, x), x, T=2.3, method=method, step_size=0.5,
                         rtol=1e-2, atol=1e-3, adjoint=adjoint)  # fmt: skip
        loss = (values(solution) * torch.linspace(0.5, 1.5, values(solution).numel())).sum()
        grads.append(torch.autograd.grad(loss, [x, *field.parameters()]))
        work.append((solution.stats, solution.nfe_backward))
    for direct, checkpointed in zip(*grads, strict=True):
        assert_close("gradient", checkpointed, direct, tolerance=1e-12)
    (stats, again), (checkpoint_stats, checkpoint_again) = work
    assert stats == checkpoint_stats and again == 0
    starts = 1 if METHODS[method](1e-6, 1e-6).is_adaptive else 0
    assert 0 < checkpoint_again <= stats.nfe - starts


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_gradcheck(kind, adjoint):
    if kind == "linear":
        graph, leaves = linear_problem(n=5, d=2)

        def run(*tensors):
            named = dict(zip(leaves, tensors, strict=True))
            term = linear_term(graph, named)
            return values(solve(term, named["x0"], T=0.8, step_size=0.4, adjoint=adjoint))

        inputs = [t.clone().requires_grad_() for t in leaves.values()]
    else:
        field, graph, x0 = nonlinear(n=4, d=2)
        names = [name for name, _ in field.named_parameters()]

        def run(x, *tensors):
            def f(t, y):
                given = dict(zip(names, tensors, strict=True))
                return torch.func.functional_call(field, given, (y, graph, x))

            return values(solve(f, x, T=0.8, method="rk4", step_size=0.4, adjoint=adjoint))

        inputs = [x0.requires_grad_(), *(p.detach().clone().requires_grad_()
                                         for p in field.parameters())]  # fmt: skip
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_second_derivatives_through_a_checkpointed_solve():
    f, m = linear_field()
    x0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    found = []
    for adjoint in ("direct", "checkpoint"):
        loss = values(solve(lambda t, x: torch.tanh(f(t, x)), x0, step_size=0.5,
                            adjoint=adjoint)).square().sum()  # fmt: skip
        (dx,) = torch.autograd.grad(loss, x0, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x0)[0])
    assert_close("second derivative", found[1], found[0], tolerance=1e-12)


def test_the_continuous_adjoint_reaches_the_penalties():
    field, graph, x0 = nonlinear()
    grads = []
    for adjoint in ("direct", "continuous"):
        x = x0.clone().requires_grad_()
        solution = solve(nonlinear_term(field, graph, x), x, adjoint=adjoint, **TIGHT)
        grads.append(torch.autograd.grad(values(solution).sum(), [x, *field.parameters()]))
    for name, exact, got in zip(["x0", *dict(field.named_parameters())], *grads, strict=True):
        if name == "key.bias":  # cancels in the softmax
            assert float(got.abs().max()) < 1e-11
        else:
            assert_close(name, got, exact, tolerance=1e-6)


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
def test_random_and_autocast_terms_run_again_as_they_ran(adjoint):
    torch.manual_seed(0)
    w = torch.nn.Linear(4, 4)
    x0 = torch.randn(6, 4, requires_grad=True)

    def run(mode):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solution = solve(
                lambda t, x: torch.dropout(torch.tanh(w(x)), 0.5, train=True).float() - x, x0,
                T=2.0, step_size=0.5, adjoint=mode,
            )  # fmt: skip
        return torch.autograd.grad(values(solution).square().sum(), [x0, *w.parameters()])

    state = torch.get_rng_state()
    for got, want in zip(run(adjoint), run("direct"), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
def test_checkpoint_keeps_nothing_of_what_stages_save(adjoint):
    saved = []

    def f(t, x):
        y = torch.tanh(x)  # saved by its backward, and by that of the Jacobian
        saved.append(StorageWeakRef(y.untyped_storage()))
        return y - x

    x0 = torch.randn(6, 4, requires_grad=True)
    solution = solve(f, x0, T=3.0, step_size=1.0, adjoint=adjoint)
    assert {ref.expired() for ref in saved} == {adjoint == "checkpoint"}
    values(solution).sum().backward()
    del solution
    assert len(saved) == 12 * (1 + (adjoint == "checkpoint")) and all(r.expired() for r in saved)


def test_a_term_that_changes_is_named():
    calls = []

    def f(t, x):
        calls.append(t)
        return -x if len(calls) <= 4 else -x * x.sin().cos()

    x0 = torch.randn(3, 2, requires_grad=True)
    solution = solve(f, x0)
    with pytest.raises(RuntimeError, match="must do the same.*saved"):
        values(solution).sum().backward()


def test_penalties_leave_the_state_alone():
    field, graph, x0 = nonlinear()
    term = nonlinear_term(field, graph, x0)
    plain = gf.integrate(term, x0, 2.0, step_size=0.3, times=[0.5, 2.0])
    solution = solve(term, x0, T=2.0, step_size=0.3, times=[0.5, 2.0])
    assert plain.penalties == {}
    assert plain.stats == solution.stats
    assert_close("x", solution.x, plain.x, tolerance=1e-14)
    assert_close("xs", solution.xs, plain.xs, tolerance=1e-14)


def test_penalties_are_those_at_the_end_where_steps_pass_it():
    field, graph, x0 = nonlinear()
    term = nonlinear_term(field, graph, x0)
    ends, passes = (
        values(solve(term, x0, T=1.3, end=end, method="dopri5", rtol=1e-8, atol=1e-8))
        for end in ("clamp", "interp")
    )
    assert_close("x and penalties", passes, ends, tolerance=1e-6)


def test_without_gradients_nothing_is_recorded():
    field, graph, x0 = nonlinear()
    want = values(solve(nonlinear_term(field, graph, x0), x0)).detach()
    with torch.no_grad():
        got = values(solve(nonlinear_term(field, graph, x0), x0))
    assert not got.requires_grad
    assert_close("x and penalties", got, want, tolerance=1e-15)
    with torch.inference_mode():
        solve(nonlinear_term(field, graph, x0), x0, names=("kinetic",))
        with pytest.raises(NotImplementedError, match="inference mode.*no_grad"):
            solve(nonlinear_term(field, graph, x0), x0)


def test_a_field_that_does_not_depend_on_the_state():
    x0 = torch.randn(5, dtype=torch.float64)  # one channel, no axis for it
    got = solve(lambda t, x: torch.full_like(x, 2.0), x0, T=3.0).penalties
    assert_close("kinetic", got["kinetic"], torch.full_like(x0, 6.0), tolerance=1e-14)
    for name in REGULARIZERS[1:]:
        assert torch.equal(got[name], torch.zeros_like(x0))


@pytest.mark.parametrize("shape", [(0, 3), (4, 2, 3)], ids=["no-nodes", "three-axes"])
def test_shapes(shape):
    x0 = torch.randn(shape, dtype=torch.float64)
    got = solve(lambda t, x: -x, x0).penalties["jacobian"]
    want = x0.new_full(shape[:1], x0[0].numel() if len(x0) else 0)
    assert_close("jacobian", got, want, tolerance=1e-12)


def test_the_probe_follows_the_generator():
    field, graph, x0 = nonlinear()
    term = nonlinear_term(field, graph, x0)

    def run(generator):
        return gf.integrate(
            term, x0, 1.0, regularizers=["jacobian"], generator=generator
        ).penalties["jacobian"]

    assert torch.equal(run(seeded(1)), run(seeded(1)))
    assert not torch.equal(run(seeded(1)), run(seeded(2)))
    torch.manual_seed(3)
    first = run(None)
    torch.manual_seed(3)
    assert torch.equal(first, run(None))


BAD = {
    "name": (ValueError, "`regularizers`.*one of kinetic.*got 'energy'",
             {"regularizers": ("energy",)}),
    "string": (TypeError, "sequence of names, got 'kinetic'", {"regularizers": "kinetic"}),
    "generator": (TypeError, "`generator`.*got int",
                  {"regularizers": ("jacobian",), "generator": 3}),
    "no axis": (ValueError, "axis of nodes",
                {"regularizers": ("kinetic",), "x0": torch.tensor(1.0)}),
    "matrix": (NotImplementedError, "takes a matrix. Use rk4",
               {"regularizers": ("kinetic",), "method": "uniformisation"}),
    "memory": (NotImplementedError, "`memory_limit`",
               {"regularizers": ("jacobian",), "memory_limit": 10**6}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, text, options = BAD[case]
    options = {"x0": torch.ones(3, 2), **options}
    with pytest.raises(error, match=text) as caught:
        gf.integrate(lambda t, x: -x, options.pop("x0"), 1.0, **options)
    assert str(caught.value).startswith("integrate: ")


def test_within_a_memory_limit_kinetic_remains():
    field, graph, x0 = nonlinear()
    grads = []
    for options in ({"adjoint": "direct"}, {"memory_limit": 10**5}):
        x = x0.clone().requires_grad_()
        solution = solve(nonlinear_term(field, graph, x), x, T=4.0, step_size=0.5,
                         names=("kinetic",), **options)  # fmt: skip
        grads.append(torch.autograd.grad(values(solution).sum(), x)[0])
    assert_close("dx0", grads[1], grads[0], tolerance=1e-12)


@pytest.mark.parametrize("variant", ["l", "nl", "laplacian"])
def test_the_model_offers_its_penalties_while_training(variant):
    _, graph, _ = nonlinear()
    model = gf.nn.GRAND(3, 4, 2, variant=variant, regularizers=("kinetic", "jacobian")).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    model(x, graph)
    assert {name: p.shape for name, p in model.penalties.items()} == {
        "kinetic": (6,),
        "jacobian": (6,),
    }
    (0.1 * model.penalties["kinetic"].mean()).backward()
    assert float(model.encoder.weight.grad.abs().max()) > 0
    model.eval()(x, graph)
    assert model.penalties == {}
