"""`relu_dropout` against its two parts."""

import pytest
import torch
from torch.nn import functional

from grand_fast.kernels.cpu import memory
from grand_fast.nn.encoder import relu_dropout
from grand_fast.testing import assert_close


def in_parts(x, p, *, training):
    return functional.dropout(torch.relu(x), p, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_result_draws_and_gradient_are_those_of_the_parts(p, training):
    results = []
    for function in (relu_dropout, in_parts):
        torch.manual_seed(0)
        x = torch.linspace(-1, 1, 60).view(20, 3).requires_grad_()
        y = function(x, p, training=training)
        (dx,) = torch.autograd.grad((y * torch.arange(3)).sum(), x)
        results.append((y, dx))
    (y, dx), (want_y, want_dx) = results
    assert torch.equal(y, want_y)
    assert_close("dx", dx, want_dx)


def test_it_keeps_its_result_alone():
    saved = set()

    def pack(t):
        saved.add(t.untyped_storage().data_ptr())
        return t

    x = torch.randn(50, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = relu_dropout(x, 0.5, training=True)
    assert saved == {y.untyped_storage().data_ptr()}


def test_second_derivatives():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        torch.manual_seed(0)
        return relu_dropout(x, 0.4, training=True).square()

    assert torch.autograd.gradgradcheck(seeded, (x,))


def test_draws_are_those_of_the_parts_in_any_layout():
    x = torch.linspace(-1, 1, 60).view(20, 3).t()
    results = []
    for function in (relu_dropout, in_parts):
        torch.manual_seed(0)
        results.append(function(x, 0.3, training=True))
    assert torch.equal(*results)


def test_what_it_keeps_lies_where_results_of_kernels_do(monkeypatch):
    taken = []

    def take(*shape, dtype):
        taken.append(torch.empty(shape, dtype=dtype))
        return taken[-1]

    monkeypatch.setattr(memory, "empty", take)
    y = relu_dropout(torch.randn(30, 4), 0.5, training=True)
    assert y.data_ptr() == taken[0].data_ptr()
