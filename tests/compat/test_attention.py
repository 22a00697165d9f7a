"""Layers whose weights stand for themselves until somebody reads them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import grand_fast as gf
from grand_fast.compat.deferred import Deferred
from grand_fast.testing import assert_close
from tests._pairwise import pairwise
from tests.compat import _released
from tests.compat._released import F64, OPT, D, N, edges

LAYER = "SpGraphTransAttentionLayer"
own = _released.SpGraphTransAttentionLayer.forward
FUSED = "torch_sparse.spmm, one pass with the attention"


def layer_of(rest="pair", weight=False, **opt):
    edge = edges()
    weights = torch.rand(edge.shape[1], dtype=F64) + 0.5 if weight else None
    layer = _released.SpGraphTransAttentionLayer(D, OPT | opt, weights, rest).double()
    return layer, torch.randn(N, D, dtype=F64), edge


def spmm(edge, values, x):
    import torch_sparse

    return torch_sparse.spmm(edge, values, len(x), len(x), x)


def parts(out):
    return out if isinstance(out, tuple) else (out, None)


def compare(layer, x, edge, use):
    """`use(attention, rest, x)` and its gradients, patched as they were; the patch's report."""
    results, report = [], None
    for is_ours in (False, True):
        leaf = x.clone().requires_grad_()
        if is_ours:
            patch = gf.compat.patch()
        state = leaf * 1
        y = use(*parts(layer(state, edge)), state)
        tensors = [leaf, *layer.parameters()]
        grads = torch.autograd.grad(y.sin().sum(), tensors, allow_unused=True)
        results.append([y.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
        if is_ours:
            patch.remove()
            report = patch.report
    for i, (theirs, ours) in enumerate(zip(*results, strict=True)):
        assert_agrees(str(i), ours, theirs)
    return report


def assert_agrees(name, ours, theirs):
    """To 1e-9 of the largest value, or of 1: by the bias of the keys a softmax has gradient 0."""
    floor = torch.ones(1, dtype=F64)
    ours, theirs = (torch.cat([t.double().flatten(), floor]) for t in (ours, theirs))
    assert_close(name, ours, theirs, tolerance=1e-9)


@pairwise(
    attention_type=("scaled_dot", "cosine_sim", "pearson", "exp_kernel"),
    square_plus=(False, True),
    attention_norm_idx=(0, 1),
    reweight_attention=(False, True),
)
def test_a_layer_is_as_it_was(attention_type, square_plus, attention_norm_idx, reweight_attention):
    layer, x, edge = layer_of(
        weight=True,
        attention_type=attention_type,
        square_plus=square_plus,
        attention_norm_idx=attention_norm_idx,
        reweight_attention=reweight_attention,
    )
    fused = compare(layer, x, edge, lambda a, _, x: spmm(edge, a.mean(dim=1), x))
    assert fused.used == {LAYER: 1, FUSED: 1} and not fused.left
    apart = compare(layer, x, edge, lambda a, _, x: spmm(edge, a.mean(1), x.cos()))
    assert apart.used == {LAYER: 1, "torch_sparse.spmm": 1}
    written = compare(layer, x, edge, lambda a, _, x: a * 2)
    assert written.used == {LAYER: 1}


class Doubled(torch.autograd.Function):
    """C++ takes the inputs of such a function as they are."""

    @staticmethod
    def forward(ctx, a):
        return a * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@torch.jit.script
def scripted(a: torch.Tensor) -> torch.Tensor:
    return a.mean(1) * 2 + a.sum()


def changed(a):
    a[0] = 0.5
    a.mul_(2)
    return a


def head_changed(a):
    head = a[:, 1]
    head.mul_(3)
    return a


def mean_changed(a):
    first = a.mean(1)
    first -= 0.5
    return torch.cat([first, a.mean(1)])


USES = {
    "sum": lambda a: a.sum(),
    "mask": lambda a: a[a.mean(dim=1) > 0.2],
    "item": lambda a: a[2],
    "one head": lambda a: a[:, -1],
    "mean over edges": lambda a: a.mean(0),
    "mean of all": lambda a: a.mean(),
    "mean kept": lambda a: a.mean(1, keepdim=True),
    "mean by torch": lambda a: torch.mean(a, dim=1),
    "mean twice": lambda a: a.mean(1) * a.mean(1),
    "stack": lambda a: torch.stack([a, a]),
    "changed in place": changed,
    "one head changed in place": head_changed,
    "a mean changed in place": mean_changed,
    "autograd function": Doubled.apply,
    "autograd function of the mean": lambda a: Doubled.apply(a.mean(1)),
    "TorchScript": scripted,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_whoever_reads_weights_has_their_values_and_gradients(use):
    layer, x, edge = layer_of()
    compare(layer, x, edge, lambda a, _, x: use(a))


REST = {
    "values and scores": ("pair", lambda rest: rest[0].sum() + (rest[1] ** 2).sum()),
    "unpacked": ("pair", lambda rest: sum(t.sin().sum() for t in rest)),
    "values": ("v", lambda v: v[:, :, 0].sin()),
    "values by a function": ("v", lambda v: Doubled.apply(v)),
}


@pytest.mark.parametrize(("rest", "use"), REST.values(), ids=REST)
def test_what_a_layer_returns_beside_weights(rest, use):
    layer, x, edge = layer_of(rest)
    report = compare(layer, x, edge, lambda a, r, x: spmm(edge, a.mean(1), x).sum() + use(r))
    assert report.used == {LAYER: 1, FUSED: 1}


def test_weights_alone():
    layer, x, edge = layer_of("none")
    compare(layer, x, edge, lambda a, _, x: spmm(edge, a.mean(1), x))


def test_a_result_that_can_no_longer_be_computed():
    layer, x, edge = layer_of("v")
    attention = layer(x, edge)[0].detach()
    with gf.compat.patch():
        first, v = layer(x, edge)
        second, other = layer(x, edge)
        other.sum()  # read in time
        mean = first.mean(1)
        with torch.no_grad():
            layer.Q.weight.add_(1.0)
        with pytest.raises(RuntimeError, match="has been changed since"):
            v.sum()
        other.sum()
        assert_close("weights", first * 1, attention)
        assert_close("mean", mean * 1, attention.mean(1))
        with torch.no_grad():
            layer.Q.weight.sub_(1.0)
        third, _ = layer(x, edge)
        before = x.clone()
        x.add_(1.0)  # what was computed from it before goes on as it was
        got = spmm(edge, third.mean(1), x)
    assert_close("y", got, spmm(edge, layer(before, edge)[0].mean(1), x), tolerance=1e-9)


def test_weights_that_are_read_are_the_layers_own_bit_for_bit():
    """Those of the released start are all but equal: a threshold parts them by rounding."""
    layer, x, edge = layer_of()
    for p in layer.parameters():
        nn.init.constant_(p, 1e-5)
    attention, (v, scores) = layer(x, edge)
    with gf.compat.patch():
        ours, rest = layer(x, edge)
        mean, head = ours.mean(dim=1), ours[:, 1]
        assert torch.equal(
            mean > mean.quantile(0.4), attention.mean(1) > attention.mean(1).quantile(0.4)
        )
        assert torch.equal(mean * 1, attention.mean(1)) and torch.equal(head * 1, attention[:, 1])
        assert torch.equal(ours * 1, attention)
        assert torch.equal(rest[0], v) and torch.equal(rest[1], scores)


def test_the_first_evaluations_of_a_solve_run_without_gradients():
    """They must not leave weights without a graph to the later ones."""
    layer, x, edge = layer_of()

    def use(attention, _, x):
        with torch.no_grad():
            y = spmm(edge, attention.mean(1), x.cos())
            z = attention.mean(1) + 1
            assert not y.requires_grad and not z.requires_grad
        assert attention.requires_grad and attention.mean(1).requires_grad
        return spmm(edge, attention.mean(1), x.cos()) + attention.sum()

    compare(layer, x, edge, use)


def test_weights_of_two_evaluations_do_not_mix():
    layer, x, edge = layer_of()

    def use(attention, _, x):
        other = x.sin()
        second, _ = layer(other, edge)
        y = spmm(edge, attention.mean(1), other) + spmm(edge, second.mean(1), other)
        return y + spmm(edge, second.mean(1), x)

    report = compare(layer, x, edge, use)
    assert report.used == {LAYER: 2, FUSED: 1, "torch_sparse.spmm": 2}


def test_other_edges_than_those_of_the_weights():
    layer, x, edge = layer_of()
    report = compare(layer, x, edge, lambda a, _, x: spmm(edge.flip(0), a.mean(1), x))
    assert report.used == {LAYER: 1, "torch_sparse.spmm": 1}


class Tempered(_released.SpGraphTransAttentionLayer):
    def forward(self, x, edge):
        attention, rest = own(self, x, edge)
        return attention.square(), rest


class HalfFrozen(_released.SpGraphTransAttentionLayer):
    """The values agree, the gradients do not."""

    def forward(self, x, edge):
        bias = self.V.bias.sum()
        return own(self, x, edge)[0] + bias - bias.detach()


class Dropped(_released.SpGraphTransAttentionLayer):
    def forward(self, x, edge):
        return nn.functional.dropout(own(self, x, edge)[0], 0.5)


class Remembering(_released.SpGraphTransAttentionLayer):
    def forward(self, x, edge):
        self.last, rest = own(self, x, edge)
        return self.last, rest


class Failing(_released.SpGraphTransAttentionLayer):
    def forward(self, x, edge):
        assert len(x) == N, "built for its own graph"
        return own(self, x, edge)


class Bare(_released.SpGraphTransAttentionLayer):
    def __init__(self, *args):
        super().__init__(*args)
        self.K = nn.Sequential(self.K)

    def forward(self, x, edge):
        return own(self, x, edge)


class Lying(_released.SpGraphTransAttentionLayer):
    """Its options say nothing of what it does."""

    def forward(self, x, edge):
        options, self.opt = self.opt, OPT | {"attention_type": "cosine_sim"}
        out = own(self, x, edge)
        self.opt = options
        return out


ALONE = {
    Tempered: "none of ours", HalfFrozen: "gradient by V.bias", Dropped: "not the same twice",
    Remembering: "changes the layer", Failing: "built for its own graph", Bare: "K is no Linear",
}  # fmt: skip
for cls in (*ALONE, Lying):
    cls.__name__ = LAYER  # which they are known by


@pytest.mark.parametrize("cls", ALONE, ids=lambda c: c.__qualname__)
def test_what_does_not_agree_is_left_alone(cls):
    layer, x, edge = cls(D, OPT).double(), torch.randn(N, D, dtype=F64), edges()
    results = []
    for is_ours in (True, False):
        patch = gf.compat.patch(attention=is_ours)
        with patch, torch.random.fork_rng():
            out = layer(x, edge)
        results.append(out[0] if isinstance(out, tuple) else out)
        assert not patch.report.used
        if is_ours:
            [(_, reason)] = patch.report.left
            assert ALONE[cls] in reason
    assert type(results[0]) is torch.Tensor and torch.equal(*results)


def test_a_layer_is_tried_again_when_its_options_change():
    layer, x, edge = layer_of()
    with gf.compat.patch():
        layer(x, edge)
        layer.opt["square_plus"] = True
        ours = layer(x, edge)[0] * 1
        layer.Q = nn.Sequential(layer.Q)
        assert type(layer(x, edge)[0]) is torch.Tensor
    assert_close("a", ours, layer(x, edge)[0])


def test_options_that_lie_are_found_out_and_believed_only_if_told_so():
    layer, x, edge = Lying(D, dict(OPT)).double(), torch.randn(N, D, dtype=F64), edges()
    theirs = layer(x, edge)[0]
    with gf.compat.patch() as patch:
        assert_close("a", layer(x, edge)[0] * 1, theirs)  # its formula is found all the same
    assert patch.report.used == {LAYER: 1}
    y = spmm(edge, theirs.mean(1), x)
    with gf.compat.patch(verify=False):
        assert (spmm(edge, layer(x, edge)[0].mean(1), x) - y).abs().max() > 1e-3


@pytest.mark.parametrize("cls", [_released.SpGraphTransAttentionLayer, Dropped])
def test_the_random_numbers_of_the_program_are_its_own(cls):
    layer, x, edge = cls(D, OPT).double(), torch.randn(N, D, dtype=F64), edges()
    drawn = []
    for is_ours in (False, True):
        torch.manual_seed(5)
        with gf.compat.patch(attention=is_ours):
            layer(x, edge)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_copies_and_pickles():
    layer, x, edge = layer_of()
    theirs = layer(x, edge)[0]
    with gf.compat.patch(layer):
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_close("a", twin(x, edge)[0] * 1, theirs)
        with torch.no_grad():
            attention = layer(x, edge)[0]
        assert type(attention) is Deferred
        file = io.BytesIO()
        torch.save(attention, file)
        file.seek(0)
        for twin in (copy.deepcopy(attention), torch.load(file, weights_only=True)):
            assert type(twin) is torch.Tensor
            assert_close("a", twin, theirs)


def test_inference_mode_and_double_backward():
    layer, x, edge = layer_of()
    with gf.compat.patch() as patch, torch.inference_mode():
        y = spmm(edge, layer(x * 1, edge)[0].mean(1), x * 1)
    assert_close("y", y, spmm(edge, layer(x, edge)[0].mean(1), x))
    assert not patch.report.left

    def squared(attention, _, x):
        y = spmm(edge, attention.mean(1), x)
        (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        return g

    compare(layer, x, edge, squared)
    compare(layer, x, edge, lambda a, _, x: torch.autograd.grad(
        Doubled.apply(a).sin().sum(), x, create_graph=True)[0])  # fmt: skip


def test_float32_autocast_and_torch_func():
    layer, x, edge = layer_of()
    layer, x = layer.float(), x.float()
    theirs = spmm(edge, layer(x, edge)[0].mean(1), x)
    with gf.compat.patch() as patch:
        assert_close("y", spmm(edge, layer(x, edge)[0].mean(1), x), theirs)
        with torch.autocast("cpu"):
            layer(x, edge)
        torch.func.vmap(lambda s: layer(s, edge)[0])(torch.stack([x, x]))
    assert patch.report.left[LAYER, "autocast is on"] == 1
    assert patch.report.left[LAYER, "a transform of torch.func is at work"] == 1
