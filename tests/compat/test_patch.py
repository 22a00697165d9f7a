"""What is replaced, for whom, and how it is put back."""

import copy
import gc
import pickle
import sys
import types
import weakref

import pytest
import torch
import torchdiffeq
from torch import nn

import grand_fast as gf
from grand_fast.compat import active, solver, spmm
from grand_fast.testing import assert_close
from tests.compat import _released
from tests.compat._released import F64, OPT, D, N, edges

SPMM = "torch_sparse.spmm"
FUSED = f"{SPMM}, one pass with the attention"
X = torch.linspace(-1, 1, N * D, dtype=F64).view(N, D)


def block(linear=False, **opt):
    opt = OPT | opt
    field = _released.Field(opt, edges())
    return _released.Block(field, opt, linear).double()


def names():
    import torch_sparse

    layer = _released.SpGraphTransAttentionLayer
    return torch_sparse.spmm, torchdiffeq.odeint, torchdiffeq.odeint_adjoint, layer.forward


def test_everything_is_put_back(monkeypatch):
    import torch_sparse

    user = types.ModuleType("user_of_spmm")
    user.spmm, user.solve = torch_sparse.spmm, torchdiffeq.odeint
    monkeypatch.setitem(sys.modules, "user_of_spmm", user)
    before = (*names(), user.spmm, user.solve)
    with gf.compat.patch() as patch:
        inside = (*names(), user.spmm, user.solve)
        assert all(a is not b for a, b in zip(before, inside, strict=True))
        inner = sys.modules["torchdiffeq._impl.adjoint"]  # theirs goes on with theirs
        assert inner.odeint is before[1] and inner.odeint_adjoint is before[2]
        assert patch.is_active and user.spmm is spmm.spmm and user.solve is solver.odeint
    assert (*names(), user.spmm, user.solve) == before
    assert not patch.is_active and "__init_subclass__" not in vars(nn.Module)


def test_each_option_alone():
    for option, changed in (("spmm", {0}), ("attention", {3}), ("solver", {1, 2})):
        others = {"spmm": False, "attention": False, "solver": None}
        del others[option]
        before = names()
        with gf.compat.patch(**others):
            pairs = enumerate(zip(before, names(), strict=True))
            assert {i for i, (a, b) in pairs if a is not b} == changed


def test_patches_nest_and_the_last_one_answers():
    x, edge = X[:, :1], edges()

    def product():
        import torch_sparse

        torch_sparse.spmm(edge, torch.ones(edge.shape[1], dtype=F64), N, N, x)

    with gf.compat.patch() as outer:
        product()
        with gf.compat.patch(spmm=False) as off:
            product()
            with gf.compat.patch(attention=False) as on:
                product()
        product()
    assert outer.report.used == {SPMM: 2} and on.report.used == {SPMM: 1}
    assert not off.report.used


@pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
def test_exact_gradients_reach_attention_that_is_computed_once(method):
    """Also by a method that is torchdiffeq's own."""

    def gradient(solver, adjoint=True):
        torch.manual_seed(3)
        opt = OPT | {"adjoint": adjoint, "method": method}
        with gf.compat.patch(attention=False, solver=solver) as patch:
            model = _released.Block(_released.Field(opt, edges()), opt, True).double()
            model(X).square().sum().backward()
        return model.multihead_att_layer.Q.weight.grad, patch.report.used

    same, _ = gradient("same")
    exact, used = gradient("exact")
    plain, _ = gradient("same", adjoint=False)
    assert same is None and used[solver.EXACT] == (method == "dopri5")
    assert_close("dQ", exact, plain)


def test_out_of_order_and_twice():
    before = names()
    first = gf.compat.patch()
    second = gf.compat.patch()
    with pytest.raises(RuntimeError, match="applied later"):
        first.remove()
    assert first.is_active and second.is_active
    second.remove()
    with pytest.raises(RuntimeError, match="removed already"):
        second.remove()
    with pytest.raises(RuntimeError, match="was removed"), second:
        pass
    first.remove()
    assert names() == before

    model = block()
    with gf.compat.patch(model):
        with pytest.raises(RuntimeError, match="patched already"):
            gf.compat.patch(model)
        assert len(active.stack) == 1
    assert names() == before and not model._forward_hooks


def test_a_block_takes_those_inside_with_it_and_hides_no_error():
    before = names()
    with pytest.raises(RuntimeError, match="applied inside"), gf.compat.patch() as outer:
        inner = gf.compat.patch(block())
    assert not outer.is_active and not inner.is_active and names() == before
    with pytest.raises(KeyError, match="mine"), gf.compat.patch():
        gf.compat.patch()
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"), gf.compat.patch() as outer:
        outer.remove()
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="removed already"), gf.compat.patch() as outer:
        outer.remove()
    assert names() == before and not active.stack


def test_a_patch_that_is_removed_lets_go_of_its_model():
    model = block()
    seen = weakref.ref(model)
    with gf.compat.patch(model) as patch:
        assert patch.target is model
    del model
    gc.collect()
    assert seen() is None and patch.target is None and repr(patch) == "<Patch of Block, removed>"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"target": 3}, TypeError, "`target` must be a Module"),
        ({"spmm": 1}, TypeError, "`spmm` must be a bool, got int"),
        ({"verify": None}, TypeError, "`verify` must be a bool"),
        ({"fields": "all"}, ValueError, "`fields` must be 'known' or None, got 'all'"),
        ({"solver": "fast"}, ValueError, "`solver` must be 'same', 'exact' or None"),
    ],
    ids=str,
)
def test_bad_options_change_nothing(options, error, says):
    before = names()
    with pytest.raises(error, match=says):
        gf.compat.patch(**options)
    assert names() == before and not active.stack


def test_a_fault_on_the_way_leaves_nothing_half_patched(monkeypatch):
    class Odd(nn.Linear):
        def register_forward_pre_hook(self, *args, **kwargs):
            raise RuntimeError("no hooks here")

    model = nn.Sequential(block(), Odd(2, 2))
    before = names()
    with pytest.raises(RuntimeError, match="no hooks here"):
        gf.compat.patch(model)
    assert names() == before and not active.stack and not model[0]._forward_pre_hooks
    assert model[0].train_integrator is torchdiffeq.odeint
    with gf.compat.patch():
        pass


def test_without_torch_sparse(monkeypatch, tmp_path):
    theirs = [one for one in sys.meta_path if type(one).__name__ != "_Finder"]  # of stand_ins
    monkeypatch.setattr(sys, "meta_path", theirs)
    monkeypatch.delitem(sys.modules, "torch_sparse", raising=False)
    with gf.compat.patch() as patch:
        assert patch.report.left == {("torch_sparse", "it is not installed"): 1}

    (tmp_path / "torch_sparse.py").write_text("raise OSError('undefined symbol\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    with gf.compat.patch() as patch:
        [(_, reason)] = patch.report.left
        assert reason == "it cannot be imported: OSError: undefined symbol"


@pytest.mark.parametrize("own", [
    lambda *args: "mine",
    lambda index, value, m, n, matrix: matrix,
    lambda i, v, m, n, x: torch.sparse_coo_tensor(i, v, (m, n)).to_dense() @ x,
])  # fmt: skip
def test_another_function_by_the_name_of_spmm(monkeypatch, own):
    module = types.ModuleType("torch_sparse")
    module.spmm = own
    monkeypatch.setitem(sys.modules, "torch_sparse", module)
    with gf.compat.patch() as patch:
        assert module.spmm is own
    [(name, reason)] = patch.report.left
    assert name == SPMM and reason == "it is another function than that of torch_sparse"


def test_one_model_alone():
    mine, other = block(linear=True), block(linear=True)
    theirs = mine(X)
    with gf.compat.patch(mine) as patch:
        assert mine.train_integrator is solver.odeint
        assert other.train_integrator is not solver.odeint
        other(X)
        assert not patch.report.used
        ours = mine(X)
        assert patch.report.used.keys() == {SPMM, FUSED, "torchdiffeq.odeint",
                                            "SpGraphTransAttentionLayer"}  # fmt: skip
        counts = patch.report.used.copy()
        mine.odefunc.attention_weights = None  # of a graph, which deepcopy refuses
        twin = copy.deepcopy(mine)
        assert_close("y", twin(X), theirs, tolerance=1e-9)
        twin.odefunc.attention_weights = None
        assert_close("y", pickle.loads(pickle.dumps(twin))(X), theirs, tolerance=1e-9)
        assert patch.report.used == counts  # a copy is no part of the model
    assert mine.train_integrator is torchdiffeq.odeint
    assert_close("y", ours, theirs, tolerance=1e-9)
    assert_close("y", twin(X), theirs, tolerance=1e-9)
    assert not mine._forward_hooks and not mine._forward_pre_hooks


def test_a_model_in_a_patched_process_and_an_error_in_its_forward():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = block()

        def forward(self, x):
            self.inner(x)
            raise KeyError("mine")

    model = Failing()
    with gf.compat.patch(spmm=False, attention=False, solver=None) as outer:
        with gf.compat.patch(model) as patch, pytest.raises(KeyError, match="mine"):
            model(X)
        assert patch.report.used["torchdiffeq.odeint"] == 1
        block()(X)
    assert not outer.report.used and not active._thread.inside


def test_classes_defined_under_a_patch():
    with gf.compat.patch() as patch:

        class SpGraphTransAttentionLayer(_released.SpGraphTransAttentionLayer):
            def forward(self, x, edge):
                return super().forward(x, edge)

        SpGraphTransAttentionLayer(D, OPT).double()(X, edges())
        assert patch.report.used == {"SpGraphTransAttentionLayer": 1}
    SpGraphTransAttentionLayer(D, OPT).double()(X, edges())
    assert not hasattr(SpGraphTransAttentionLayer.forward, "_theirs")


def test_a_layer_of_another_name_with_the_same_parts():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.Q, self.K = (nn.Linear(D, 8) for _ in range(2))
            self.h, self.d_k = 2, 4

        def forward(self, x, edge):
            q, k = (m(x).view(-1, self.h, self.d_k) for m in (self.Q, self.K))
            scores = (q[edge[0]] * k[edge[1]]).sum(2) / 2
            return _released.softmax(scores, edge[0], num_nodes=len(x))

    layer = Attention().double()
    theirs = layer(X, edges())
    with gf.compat.patch() as patch:
        assert_close("a", layer(X, edges()) * 1, theirs)
    assert patch.report.used == {"Attention": 1}
    assert str(patch.report) == "grand-fast: on its kernels ran\n  Attention  once"
    assert "Attention" in repr(patch.report) and "removed" in repr(patch)
