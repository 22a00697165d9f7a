"""Logits along the diffusion, as early stopping on a validation set wants them."""

import pytest
import torch

import grand_fast as gf
from grand_fast.nn import GRAND
from grand_fast.testing import assert_close, random_graph

N = 40
SOLVES = {
    "rk4": {"step_size": 1.0},
    "cut": {"T": 2.3, "step_size": 0.5},
    "dopri5": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4},
    "explicit_adams": {"method": "explicit_adams", "step_size": 0.25},
    "implicit_adams": {"method": "implicit_adams", "step_size": 0.25},
    "semi_implicit_euler": {"method": "semi_implicit_euler", "step_size": 0.7},
    "uniformisation": {"method": "uniformisation", "variant": "l", "step_size": None},
    "continuous": {"method": "dopri5", "adjoint": "continuous"},
    "limited": {"memory_limit": 10**6},
    "hard": {"variant": "nl-rw", "attention_threshold": 0.15},
    "everything": {"variant": "mixed", "mlp": True, "batch_norm": True, "augment": 2,
                   "fc_out": True, "label_channels": 3, "degree_scaling": True},
}  # fmt: skip


def setup(name):
    options = {"T": 2.0, "heads": 2, "source": True} | SOLVES[name]
    model = GRAND(5, 6, 3, **options).eval()
    beta = model.field.scale.beta
    torch.nn.init.constant_(beta, 0.3)
    labels = torch.eye(3)[torch.randint(3, (N,))] if model.label_channels else None
    return model, torch.randn(N, 5), random_graph("random"), labels


@pytest.mark.parametrize("name", SOLVES)
def test_the_last_is_forward_and_the_first_is_the_encoder(name):
    model, x, graph, labels = setup(name)
    want = model(x, graph, labels)
    with torch.no_grad():  # which saves the evaluations that some methods make for backward
        assert torch.equal(model(x, graph, labels), want)
    stats = model.stats
    found = model.trajectory(x, graph, model.T, labels)
    times = [t for t, _ in found]
    assert times[0] == 0.0 and times[-1] == model.T and times == sorted(set(times))
    assert len(found) == stats.accepted + 1 and model.stats == stats
    assert torch.equal(found[-1][1], want)
    start, _, scale = model._start(x, graph, labels)
    assert torch.equal(found[0][1], model._decode(start, scale))
    assert not any(logits.requires_grad for _, logits in found)


@pytest.mark.parametrize("name", SOLVES)
def test_further_than_the_model(name):
    """The model's own times stay as they are, and its own logits are among those found."""
    model, x, graph, labels = setup(name)
    model.double()
    x, labels = x.double(), None if labels is None else labels.double()
    within = model.trajectory(x, graph, model.T, labels)
    T = 3 * model.T + 0.1
    found = model.trajectory(x, graph, T, labels)
    assert [t for t, _ in found[: len(within)]] == [t for t, _ in within]
    for (_, got), (_, want) in zip(found, within, strict=False):
        assert torch.equal(got, want)
    times = [t for t, _ in found]
    assert times[-1] == T and times == sorted(set(times))
    assert model.status is gf.Status.SUCCESS and model.t == model.T
    model.T = T
    # Steps lie elsewhere, or start anew; the solutions are the same but for their errors
    tolerance = {"semi_implicit_euler": 5e-2, "implicit_adams": 1e-4, "explicit_adams": 1e-4,
                 "dopri5": 1e-3, "continuous": 1e-3, "uniformisation": 1e-12}  # fmt: skip
    assert_close(
        "logits", found[-1][1], model(x, graph, labels), tolerance=tolerance.get(name, 2e-3)
    )


def test_shorter_than_the_model_and_not_at_all():
    model, x, graph, _ = setup("rk4")
    found = model.trajectory(x, graph, 1.5)
    assert [t for t, _ in found] == [0.0, 1.0, 1.5]
    model.T = 1.5
    assert torch.equal(found[-1][1], model(x, graph))
    assert [t for t, _ in model.trajectory(x, graph, 0.0)] == [0.0]
    for T, error in ((-1.0, ValueError), (float("inf"), ValueError), ("2", TypeError)):
        with pytest.raises(error, match="integrate: `T` must be"):
            model.trajectory(x, graph, T)


def test_it_ends_where_the_solve_fails():
    model, x, graph, _ = setup("dopri5")
    model.max_nfe = 20
    found = model.trajectory(x, graph, 100.0)
    assert model.status is gf.Status.SUCCESS and model.t == 2.0  # the second solve stopped
    assert 2.0 < found[-1][0] < 100.0
    model.T = 50.0
    found = model.trajectory(x, graph, 100.0)
    assert model.status is gf.Status.MAX_STEPS and found[-1][0] == model.t < 50.0
    assert torch.equal(found[-1][1], model(x, graph))


def test_an_edge_index_will_do():
    model, x, graph, _ = setup("rk4")
    got = model.trajectory(x, graph.edge_index(), 2.0)
    assert torch.equal(got[-1][1], model(x, graph))


def test_observed_states_are_those_asked_for_by_time():
    x0 = torch.randn(5, 3, dtype=torch.float64)
    seen = []
    with torch.no_grad():
        solution = gf.integrate(
            lambda t, x: -x, x0, 1.0, step_size=0.25, observe=lambda t, x: seen.append((t, x))
        )
        times = [t for t, _ in seen]
        at = gf.integrate(lambda t, x: -x, x0, 1.0, step_size=0.25, times=times)
    assert times == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert torch.equal(torch.stack([x for _, x in seen]), at.xs)
    assert torch.equal(solution.x, seen[-1][1])


def test_observing_takes_no_gradient():
    x0, heard = torch.ones(3), []
    with pytest.raises(NotImplementedError, match="`observe` must come under torch.no_grad"):
        gf.integrate(lambda t, x: -x, x0, 1.0, observe=lambda t, x: heard.append(t))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="no regularizers"):
        gf.integrate(lambda t, x: -x, x0, 1.0, regularizers=["kinetic"], observe=heard.append)
    assert not heard
