"""Checkpoints of an adaptive solve: a state a step, and the stages of one step at a time."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import grand_fast as gf
from grand_fast.nn.terms import LinearDiffusion, NonlinearDiffusion
from grand_fast.testing import assert_close, random_graph

PAIRS = ["dopri5", "bosh3"]


class Watched:
    """A vector field that counts the states and slopes alive whenever it is evaluated."""

    def __init__(self):
        self.refs, self.counts, self.calls = [], [], 0

    def alive(self):
        return len({ref.cdata for ref in self.refs if not ref.expired()})

    def __call__(self, t, x):
        self.calls += 1  # before what autograd saves, which ends the last call of a step
        f = torch.sin(2 * x)
        self.refs += [StorageWeakRef(y.untyped_storage()) for y in (x, f)]
        self.counts.append(self.alive())
        return f


def test_a_step_of_dopri5_leaves_its_state_and_backward_holds_stage_values_alone():
    x0 = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    field = Watched()
    solution = gf.integrate(
        field, x0, 3.0, method="dopri5", rtol=1e-3, atol=1e-3, adjoint="checkpoint"
    )
    steps = solution.stats.accepted
    assert steps >= 3
    y = solution.x
    del solution
    assert field.alive() == steps + 1  # x(0), …, x(T)
    field.counts.clear()
    field.calls = 0
    y.sum().backward()
    # The states of the steps before and x(T), five stage values, the latest slope
    assert max(field.counts) <= steps + 1 + 5 + 1
    assert field.calls == 6 * steps


@pytest.mark.parametrize("method", PAIRS)
def test_gradients_with_rejected_attempts_and_random_numbers(method):
    w = torch.nn.Linear(3, 3).double()
    x0 = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def f(t, x):
        return torch.tanh(w(x)) * (1 + 1e-6 * torch.rand(x.shape, dtype=x.dtype))

    grads = []
    for adjoint in ("direct", "checkpoint"):
        torch.manual_seed(1)
        solution = gf.integrate(
            f, x0, 3.0, method=method, rtol=1e-5, atol=1e-5, first_step=3.0, adjoint=adjoint
        )
        assert solution.stats.rejected > 0
        before = torch.get_rng_state()
        grads.append(torch.autograd.grad(solution.x.square().sum(), [x0, *w.parameters()]))
        assert torch.equal(torch.get_rng_state(), before)
    for direct, checkpointed in zip(*grads, strict=True):
        assert_close("gradient", checkpointed, direct)


@pytest.mark.parametrize("method", PAIRS)
def test_backward_runs_again_where_the_graph_is_kept(method):
    x0 = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    solution = gf.integrate(
        lambda t, x: torch.sin(x), x0, 2.0, method=method, times=[0.7, 2.0], end="interp"
    )
    loss = solution.xs.square().sum()
    first, again = (torch.autograd.grad(loss, x0, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("method", PAIRS)
def test_a_term_that_changes_is_named(method):
    calls = []

    def f(t, x):
        calls.append(t)
        return torch.sin(x) if len(calls) <= 30 else -x

    x0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    options = {"method": method, "rtol": 0.1, "atol": 0.1, "adjoint": "checkpoint"}
    solution = gf.integrate(f, x0, 0.5, **options)
    calls += [0.0] * 30
    with pytest.raises(RuntimeError, match="must do the same.*saved"):
        solution.x.sum().backward()


@pytest.mark.parametrize("kind", ["nl", "nl mixing features", "l", "l, two scales"])
def test_what_a_term_adds_at_all_times_is_left_out_of_slopes(kind):
    graph = random_graph("random", 12)
    x0, y = torch.randn(2, 12, 6, dtype=torch.float64)
    if kind.startswith("nl"):
        layer = gf.nn.AttentionDiffusion(6, heads=2, source=True, mix_features=kind != "nl")
        torch.nn.init.constant_(layer.scale.beta, 0.3)
        term = NonlinearDiffusion(layer.double(), graph, x0)
    else:
        a = torch.rand(graph.num_edges, dtype=torch.float64)
        beta = 1.0 if kind == "l" else torch.rand(6, dtype=torch.float64)
        term = LinearDiffusion(a, graph, alpha=0.7, beta=beta, x0=x0)
    rest, constant = term.split_constant()
    assert_close("f", rest.vf(0.0, y) + constant, term.vf(0.0, y))
    again, nothing = rest.split_constant()
    assert nothing is None
    assert torch.equal(again.vf(0.0, y), rest.vf(0.0, y))


@pytest.mark.parametrize("method", [*PAIRS, "adaptive_heun"])
@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
@pytest.mark.parametrize("end", ["clamp", "interp"])
def test_states_and_gradients_with_what_is_left_out(method, adjoint, end):
    graph = random_graph("random", 12)
    layer = gf.nn.AttentionDiffusion(6, heads=2, source=True).double()
    torch.nn.init.constant_(layer.scale.beta, 0.3)
    x0 = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x0, *(p for name, p in layer.named_parameters() if name != "key.bias")]
    options = {"method": method, "rtol": 1e-5, "atol": 1e-6, "times": [0.6, 2.0], "end": end}
    results = []
    for term in (NonlinearDiffusion(layer, graph, x0), lambda t, x: layer(x, graph, x0)):
        solution = gf.integrate(term, x0, 2.0, adjoint=adjoint, **options)
        grads = torch.autograd.grad(solution.xs.square().sum(), wanted)
        results.append((solution.stats.nfe, solution.xs.detach(), *grads))
    (nfe, *got), (want_nfe, *want) = results
    assert nfe == want_nfe
    for g, w in zip(got, want, strict=True):
        assert_close("state or gradient", g, w, tolerance=1e-9)  # rounding moves the steps' ends
