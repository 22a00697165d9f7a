"""Attention layers that change: after they were probed, or between a call and a reading."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.utils import softmax

import grand_fast as gf
from grand_fast.testing import assert_close
from tests.compat._released import F64, D, N, edges
from tests.compat.test_attention import LAYER, Doubled, assert_agrees, compare, layer_of, spmm


@torch.jit.script
def scripted(a: torch.Tensor) -> torch.Tensor:
    return a.sum() * 2


class Own(nn.Module):
    """A layer with something more to it."""

    def __init__(self):
        super().__init__()
        self.h, self.d_k, self.drop = 2, 4, nn.Dropout(0.0)
        self.Q, self.K = nn.Linear(D, 8), nn.Linear(D, 8)
        self.opt, self.cfg = argparse.Namespace(tau=1.0), {"a": {"tau": 1.0}}
        self.register_buffer("tau", torch.ones(1))
        self.seen, self.has_tau, self.sees = [], False, False
        self.double()

    def forward(self, x, edge):
        q, k = (m(x).view(-1, self.h, self.d_k) for m in (self.Q, self.K))
        scores = (q[edge[0]] * k[edge[1]]).sum(2) / 2 * self.opt.tau * self.cfg["a"]["tau"]
        if self.has_tau:
            scores = scores * self.tau
        if self.sees:
            self.seen.append(1)
        return self.drop(softmax(scores, edge[0], num_nodes=len(x)))


CHANGES = {
    "namespace": lambda layer: setattr(layer.opt, "tau", 2.0),
    "dict in a dict": lambda layer: layer.cfg["a"].update(tau=2.0),
    "probability": lambda layer: setattr(layer.drop, "p", 1.0),
    "hook on a part": lambda layer: layer.drop.register_forward_hook(lambda m, a, y: 3 * y),
    "forward of Q": lambda layer: setattr(
        layer.Q, "forward", lambda x: nn.functional.linear(x, 2 * layer.Q.weight)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_changes_after_the_probe(change):
    layer, x, edge = Own(), torch.randn(N, D, dtype=F64), edges()
    with gf.compat.patch() as patch:
        spmm(edge, layer(x, edge).mean(1), x)
        change(layer)
        ours = spmm(edge, layer(x, edge).mean(1), x)
    assert patch.report.used["Own"] == 1
    assert_close("y", ours, spmm(edge, layer(x, edge).mean(1), x))


def test_the_mode_of_a_part_that_changes_after_the_probe():
    layer, x, edge = Own(), torch.randn(N, D, dtype=F64), edges()
    layer.drop.p = 1.0
    layer.eval()
    with gf.compat.patch() as patch:
        assert spmm(edge, layer(x, edge).mean(1), x).abs().max() > 0
        layer.drop.train()
        assert spmm(edge, layer(x, edge).mean(1), x).abs().max() == 0
        layer.eval()
        layer(x, edge)
    assert patch.report.used["Own"] == 2


def test_what_is_neutral_or_a_side_effect_is_seen_by_the_probe():
    x, edge = torch.randn(N, D, dtype=F64), edges()
    layer = Own()
    layer.has_tau = True  # times a buffer of 1
    with gf.compat.patch() as patch:
        assert type(layer(x, edge)) is torch.Tensor
        layer = Own()
        layer.sees = True
        layer(x, edge), layer(x, edge)
        assert len(layer.seen) == 2
        layer = Own()
        layer.other = object()
        layer(x, edge)
    assert not patch.report.used
    reasons = [reason for _, reason in patch.report.left]
    assert "it holds a object, which may change" in reasons
    assert "its forward changes the layer or its input" in reasons


def tripled(module, grads, *further):
    return tuple(None if g is None else 3 * g for g in grads)


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_backward_hooks_of_projections(register):
    layer, x, edge = layer_of()
    getattr(layer.Q, register)(tripled)
    report = compare(layer, x, edge, lambda a, _, x: spmm(edge, a.mean(1), x))
    assert report.left == {(LAYER, "its Q has hooks"): 1}


def test_hooks_of_other_parts_see_the_program_alone():
    layer, x, edge = layer_of()
    seen = []
    layer.V.register_forward_hook(lambda m, args, y: seen.append(len(y)))
    with gf.compat.patch():
        layer(x, edge)
    assert seen == [N]


WRITES = {
    "weights": lambda a: (a, a.mul_(3)),
    "mean": lambda a: (mean := a.mean(1), mean.masked_fill_(mean < 0.2, 0.0)),
    "head by its base": lambda a: (a[:, 0], a.mul_(3)),
    "weights by a head": lambda a: (a, a[:, 0].mul_(3)),
    "cut off": lambda a: (a, a.mul(1), a.detach_()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("into", [Doubled.apply, scripted], ids=["function", "TorchScript"])
def test_what_was_changed_in_place_must_be_read_before_it_goes_to_cpp(write, into):
    layer, x, edge = layer_of()
    compare(layer, x, edge, lambda a, _, x: into(write(a)[0].clone()) + 0 * x.sum())
    x.requires_grad_()
    with gf.compat.patch():
        a = write(layer(x, edge)[0])[0]
        with torch.no_grad():
            a.sum()
        with pytest.raises(RuntimeError, match=r"a\.clone\(\)|TorchScript"):
            into(a)


def test_weights_made_without_gradients_can_be_asked_for_them():
    layer, x, edge = layer_of()
    with gf.compat.patch():
        with torch.no_grad():
            a = layer(x, edge)[0]
        a.requires_grad_()
        assert a.requires_grad and a.is_leaf
        spmm(edge, a.mean(1), x).sum().backward()
        assert a.grad is not None
        a.detach_()
        assert not a.requires_grad


UNSEEN = {
    "state by data": lambda layer, x: x.data.mul_(2),
    "matrix by data": lambda layer, x: layer.Q.weight.data.mul_(2),
    "matrix replaced": lambda layer, x: setattr(
        layer.K, "weight", nn.Parameter(2 * layer.K.weight.detach())
    ),
    "edge weights replaced": lambda layer, x: setattr(
        layer, "edge_weights", layer.edge_weights + 1
    ),
    "options": lambda layer, x: layer.opt.update(square_plus=True),
}


@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_a_result_read_after_a_change_that_has_no_version(change):
    layer, x, edge = layer_of(weight=True, reweight_attention=True)
    attention = layer(x, edge)[0].detach()
    with gf.compat.patch():
        ours, rest = layer(x, edge)
        change(layer, x)
        with pytest.raises(RuntimeError, match="has been changed since"):
            rest[1].sum()
        assert_close("weights", ours.detach(), attention)


def test_results_of_numbers_that_are_none():
    layer, x, edge = layer_of()
    x[0] = torch.nan
    with gf.compat.patch():
        assert layer(x, edge)[1][1].isnan().any()


def test_a_checkpoint_around_the_first_call():
    layer, x, edge = layer_of()
    grads = []
    for is_ours in (False, True):
        with gf.compat.patch(attention=is_ours, spmm=is_ours):
            leaf = x.clone().requires_grad_()
            y = checkpoint(
                lambda x: spmm(edge, layer(x, edge)[0].mean(1), x), leaf, use_reentrant=False
            )
            grads += torch.autograd.grad(y.sin().sum(), leaf)
    assert_agrees("dx", *grads)


def test_indices_of_arrays_and_states_without_columns():
    layer, x, edge = layer_of()
    compare(layer, x, edge, lambda a, _, x: a[np.array([0, 1]), 0])
    with gf.compat.patch() as patch:
        assert spmm(edge, torch.rand(edge.shape[1]), torch.rand(N, 0)).shape == (N, 0)
    assert not patch.report.used


def test_a_result_read_under_autocast_is_that_of_the_call():
    layer, x, edge = layer_of()
    layer, x = layer.float(), x.float()
    theirs, (_, scores) = layer(x, edge)
    with gf.compat.patch():
        attention, rest = layer(x, edge)
        with torch.autocast("cpu"):
            assert torch.equal(attention * 1, theirs) and torch.equal(rest[1], scores)


class Config:
    """Options as some loggers give them: no dict, but read like one."""

    def __init__(self, **items):
        self._items, self._told = items, object()

    def keys(self):
        return self._items.keys()

    def __getitem__(self, key):
        return self._items[key]


def test_options_that_are_read_like_a_dict():
    layer, x, edge = layer_of()
    layer.opt = Config(**layer.opt)
    with gf.compat.patch() as patch:
        layer(x, edge)
        layer.opt._items["square_plus"] = True
        ours = layer(x, edge)[0].mean(1)
        y = spmm(edge, ours, x)
    assert patch.report.used[LAYER] == 2
    assert_close("y", y, spmm(edge, layer(x, edge)[0].mean(1), x))
