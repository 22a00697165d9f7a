"""Adjoint "auto": steps keep what they save while there is room, and are run again after that."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import grand_fast as gf
from grand_fast.nn.terms import NonlinearDiffusion
from grand_fast.solvers import ADAPTIVE
from grand_fast.solvers.gradients import room
from grand_fast.testing import assert_close, random_graph

KIB = 1 << 10


@pytest.fixture
def memory(monkeypatch):
    """Sets what the steps of a solve may keep."""

    def set_to(size):
        monkeypatch.setattr(room, "free_memory", lambda device: 4 * size)

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


def test_an_attempt_that_did_not_count_takes_no_room(memory, monkeypatch):
    rooms, made = [], room.Room.of
    monkeypatch.setattr(room.Room, "of", staticmethod(lambda x: rooms.append(made(x)) or rooms[-1]))
    memory(1 << 30)
    options = {"first_step": 3.0, "rtol": 1e-6, "atol": 1e-6}
    f, (x0, *_) = problem()
    stats = gf.integrate(f, x0, 3.0, method="adaptive_heun", **options).stats
    assert stats.rejected > 1
    needed = rooms[0]._step * stats.accepted
    for size, adjoint in ((needed, "direct"), (needed - 1, "checkpoint")):
        memory(size)
        got = gf.integrate(f, x0, 3.0, method="adaptive_heun", **options).stats
        assert got == stats and got.adjoint == adjoint


def test_a_first_step_needs_room_for_what_it_may_be_expected_to_keep(memory):
    memory(16 * 50 * 4 * 8 - 1)
    assert solved("rk4", "auto")[0].nfe_backward == 12 * 4


class Watched:
    """tanh(x), which saves a value of its own; counts those alive."""

    def __init__(self):
        self.refs = []

    def __call__(self, t, x):
        y = x.tanh()
        self.refs.append(StorageWeakRef(y.untyped_storage()))
        return y

    def alive(self):
        return sum(not ref.expired() for ref in self.refs)


@pytest.mark.parametrize("options", [
    {"method": "rk4", "step_size": 0.5},
    {"method": "dopri5", "first_step": 3.0, "rtol": 1e-7, "atol": 1e-7},
    {"method": "rk4", "step_size": 0.5, "memory_limit": 1 << 20},
], ids=["rk4", "rejected", "limited"])  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_a_solve_outlives_it(options, backward):
    """A tensor that holds the node that saved it would, whatever the garbage collector does."""
    x0 = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    field = Watched()
    solution = gf.integrate(field, x0, 3.0, **options)
    if backward:
        solution.x.sum().backward()
    del solution
    gc.collect()
    assert field.alive() == 0


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("limit", [None, 1 << 20])
def test_what_has_no_storage_of_its_own_is_saved_too(layout, limit):
    matrix = (
        torch.rand(50, 50, dtype=torch.float64)
        .relu()
        .to_sparse(layout=getattr(torch, f"sparse_{layout}"))
    )
    x0 = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(gf.integrate(f, x0, 1.0, memory_limit=limit).x.sum(), x0)[0]
        for f in (lambda t, x: torch.sparse.mm(matrix, x), lambda t, x: matrix.to_dense() @ x)
    ]
    assert_close("dx0", *grads, tolerance=1e-12)


def test_derivatives_within_f():
    x0 = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)

    def f(t, x):
        return torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]

    grads = [
        torch.autograd.grad(gf.integrate(g, x0, 1.0).x.sum(), x0)[0]
        for g in (f, lambda t, x: torch.cos(x))
    ]
    assert_close("dx0", *grads, tolerance=1e-12)


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
