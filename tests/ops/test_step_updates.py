"""The combinations of a step: gradients as of one `stage_update` each, in fewer passes."""

import pytest
import torch

from grand_fast.ops import stage_update
from grand_fast.ops.backends import launchers
from grand_fast.ops.step_updates import StepUpdates
from grand_fast.testing import assert_close

# Of x and three slopes; the second slope has no share in the last
ROWS = [[0.5], [0.25, 0.75], [1.5, -2.0, 0.5], [0.3, 0.0, 0.6, 0.1]]
W = torch.tensor(0.7, dtype=torch.float64)


def climb(update, x, w, field):
    slopes, y = [field(0, x, w)], x
    for r, row in enumerate(ROWS):
        used = [(a, f) for a, f in zip(row, slopes, strict=True) if a != 0.0]
        y = update([(1.0, x), *used])
        slopes.append(field(r + 1, y, w))
    return y, slopes


def through(r, y, w):
    return torch.sin(w * y)


def constant_in_the_middle(r, y, w):
    return w * torch.ones_like(y) if r in (1, 2) else torch.sin(w * y)


@pytest.mark.parametrize("field", [through, constant_in_the_middle])
@pytest.mark.parametrize("outputs", ["state", "slopes", "both"])
def test_gradients_are_those_of_single_combinations(field, outputs):
    found = []
    for update in (stage_update, StepUpdates()):
        x = torch.linspace(-1, 2, 12, dtype=torch.float64, requires_grad=True)
        w = W.clone().requires_grad_()
        y, slopes = climb(update, x, w, field)
        loss = {"state": y.sum(), "slopes": slopes[2].sum() + slopes[4].square().sum(),
                "both": (y * slopes[3]).sum()}[outputs]  # fmt: skip
        found.append(torch.autograd.grad(loss, [x, w], allow_unused=True))
    for name, got, want in zip("xw", found[1], found[0], strict=True):
        assert_close(name, got, want)


def test_any_output_in_any_order_and_again():
    x = torch.linspace(-1, 2, 12, dtype=torch.float64, requires_grad=True)
    w = W.clone().requires_grad_()
    want_y, want_slopes = climb(stage_update, x, w, through)
    y, slopes = climb(StepUpdates(), x, w, through)
    pairs = [(y, want_y), (slopes[2], want_slopes[2]), (y, want_y), (slopes[1], want_slopes[1])]
    for inputs in ([w], [x], [x, w]):
        for got, want in pairs:
            g = torch.autograd.grad(got.sum(), inputs, retain_graph=True)
            e = torch.autograd.grad(want.sum(), inputs, retain_graph=True)
            for one, other in zip(g, e, strict=True):
                assert_close("gradient", one, other)


def test_second_derivatives():
    x = torch.linspace(-1, 2, 5, dtype=torch.float64, requires_grad=True)
    w = W.clone().requires_grad_()

    def last(x, w):
        return climb(StepUpdates(), x, w, through)[0]

    assert torch.autograd.gradcheck(last, (x, w))
    assert torch.autograd.gradgradcheck(last, (x, w))


def test_backward_writes_one_tensor_for_each_input(monkeypatch):
    module = launchers("stage_update", "cpu")
    run, passes = module.stage_update_fwd, []

    def counted(tensors, scales):
        passes.append(len(tensors))
        return run(tensors, scales)

    x = torch.randn(40, requires_grad=True)
    slopes = [torch.randn(40, requires_grad=True) for _ in ROWS]
    update, total = StepUpdates(), 0.0
    for row in ROWS:
        used = [(a, f) for a, f in zip(row, slopes, strict=False) if a != 0.0]
        total = total + update([(1.0, x), *used])
    monkeypatch.setattr(module, "stage_update_fwd", counted)
    monkeypatch.setattr(module, "stage_update_bwd", None)
    total.sum().backward()
    assert sorted(passes) == [1, 2, 2, 4, 4]  # as many rows as hold each slope, and x
