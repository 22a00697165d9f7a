"""Adjoint "auto": steps keep what they save while there is room, and are run again after that."""

import pytest
import torch

import grand_fast as gf
from grand_fast.nn.terms import NonlinearDiffusion
from grand_fast.solvers import ADAPTIVE
from grand_fast.solvers.gradients import room
from grand_fast.testing import assert_close, random_graph

KIB = 1 << 10


@pytest.fixture
def memory(monkeypatch):
    """Sets what a solve may always keep, and what is free beside it."""

    def set_to(always, free=0):
        monkeypatch.setattr(room, "_ALWAYS", always)
        monkeypatch.setattr(room, "free_memory", lambda device: free)

    return set_to


def problem():
    torch.manual_seed(0)
    w = torch.nn.Linear(4, 4).double()
    x0 = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    return lambda t, x: torch.tanh(w(x)) - x, [x0, *w.parameters()]


def solved(method, adjoint, **options):
    f, wanted = problem()
    steps = {"rtol": 1e-5, "atol": 1e-6} if method in ADAPTIVE else {"step_size": 0.25}
    solution = gf.integrate(f, wanted[0], 3.0, method=method, adjoint=adjoint, **steps, **options)
    return solution, torch.autograd.grad(solution.x.square().sum(), wanted)


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", *ADAPTIVE])
@pytest.mark.parametrize("always", [0, 28 * KIB, 1 << 30])
def test_gradients_are_the_same_wherever_room_ends(memory, method, always):
    memory(always)
    # A first step that is too long: an attempt that does not count is in the room or out of it
    first = {"first_step": 3.0} if method in ADAPTIVE else {}
    want_solution, want = solved(method, "direct", **first)
    solution, got = solved(method, "auto", **first)
    assert torch.equal(solution.x, want_solution.x)
    assert solution.stats == want_solution.stats  # no evaluation more, where it turns either
    for g, w in zip(got, want, strict=True):
        assert_close("gradient", g, w, tolerance=1e-12)
    most = solved(method, "checkpoint", **first)[0].nfe_backward
    if always == 28 * KIB:
        assert 0 < solution.nfe_backward < most
    else:
        assert solution.nfe_backward == (0 if always else most)
    assert solution.stats.adjoint == ("checkpoint" if solution.nfe_backward else "direct")


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_room_that_ends_with_a_first_attempt_from_a_state_without_gradient(memory, method):
    f, (x0, *parameters) = problem()
    grads = []
    for always in (26 * KIB, 1 << 30):
        memory(always)
        solution = gf.integrate(
            f, x0.detach(), 3.0, method=method, first_step=3.0, rtol=1e-6, atol=1e-6
        )
        assert solution.stats.rejected > 0
        grads.append(torch.autograd.grad(solution.x.square().sum(), parameters))
        if always < 1 << 30:
            assert solution.stats.adjoint == "checkpoint"
    for got, want in zip(*grads, strict=True):
        assert_close("gradient", got, want, tolerance=1e-12)


def test_room_is_a_quarter_of_what_is_free(memory):
    for free, adjoint in ((4 << 30, "direct"), (0, "checkpoint")):
        memory(0, free)
        assert solved("rk4", "auto")[0].stats.adjoint == adjoint
    memory(0, 4 * 16 * 50 * 4 * 8 - 1)  # a byte less than a first step may be expected to take
    assert solved("rk4", "auto")[0].nfe_backward == 12 * 4


def test_a_step_is_measured_by_what_it_keeps(memory):
    """Of `tanh(x)²` the value of tanh, 1600 bytes, once, and nothing of a linear stage."""
    x0 = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    stage, guess = 50 * 4 * 8, 16 * 50 * 4 * 8
    options = {"method": "rk4", "step_size": 1.0}
    for direct in (1, 3, 7):  # steps that are: 4 stages, the first by guess alone
        memory(guess + 4 * stage * (direct - 1))
        solution = gf.integrate(lambda t, x: x.tanh().square(), x0, 20.0, **options)
        solution.x.sum().backward()
        # After the first was measured, what is left of its guess serves more of them
        assert solution.nfe_backward == 4 * (20 - direct - 3)


def test_what_must_not_change_is_named():
    f, (x0, weight, _) = problem()
    solution = gf.integrate(f, x0, 1.0)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.x.sum().backward()


def test_where_it_is_a_checkpoint_or_nothing():
    f, (x0, *_) = problem()
    with torch.autograd.graph.save_on_cpu():
        assert gf.integrate(f, x0, 1.0).stats.adjoint == "checkpoint"
    with torch.no_grad():
        assert gf.integrate(f, x0, 1.0).stats.adjoint is None
    assert gf.integrate(f, x0, 1.0, memory_limit=1 << 20).stats.adjoint == "checkpoint"
    assert gf.integrate(f, x0, 1.0, regularizers=["jacobian"]).stats.adjoint == "checkpoint"
    with pytest.raises(ValueError, match="`memory_limit` must come with adjoint"):
        gf.integrate(f, x0, 1.0, memory_limit=1 << 20, adjoint="direct")


def test_small_projections_are_kept_and_large_ones_made_again(monkeypatch):
    graph = random_graph("random", 40)
    layer = gf.nn.AttentionDiffusion(8, heads=2)
    x0 = torch.randn(40, 8, requires_grad=True)
    products = []
    for kept in (1 << 20, 0):
        monkeypatch.setattr(room, "_KEPT_PROJECTION", kept)
        solution = gf.integrate(NonlinearDiffusion(layer, graph, None), x0, 2.0, method="rk4")
        sizes = {t.shape for t in _saved(solution.x)}
        products.append(torch.Size([40, 16]) in sizes)
    assert products == [True, False]


def _saved(x):
    """Tensors that the graph of `x` holds."""
    todo, found, seen = [x.grad_fn], [], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += list(getattr(node, "saved_tensors", ()))
        todo += [n for n, _ in node.next_functions]
    return [t for t in found if t is not None and t.stride(1 if t.ndim > 1 else 0) != 0]
