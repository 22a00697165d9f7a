"""Vector fields whose code is known, as one operator: values, gradients, evaluations."""

import copy
import functools
import types

import pytest
import torch
from torch import nn

import grand_fast as gf
from grand_fast.compat import fields
from tests.compat import _released
from tests.compat._released import F64, OPT, D, edges
from tests.compat.test_descendants import FUSED, LAYER, SPMM, X, both

METHOD = "multiply_attention"
MORE = {"block": "attention", "no_alpha_sigmoid": False, "mix_features": False}


class Transformer(_released.Field):
    """With the parts of the released field under their names."""

    def __init__(self, opt, edge_index):
        super().__init__(MORE | opt, edge_index)
        self.edge_weight = torch.linspace(0.1, 1.0, edge_index.shape[1], dtype=F64)

    def multiply_attention(self, x, attention, v=None):
        import torch_sparse

        return torch_sparse.spmm(self.edge_index, attention.mean(dim=1), len(x), len(x), x)

    def coefficient(self):
        alpha = self.alpha_train
        return alpha if self.opt["no_alpha_sigmoid"] else torch.sigmoid(alpha)

    def forward(self, t, x):
        self.count()
        attention, values = self.multihead_att_layer(x, self.edge_index)
        f = self.coefficient() * (self.multiply_attention(x, attention, values) - x)
        assert self.nfe and self.alpha_train is not None  # names by which a field is looked at
        return f + self.beta_train * self.x0 if self.opt["add_source"] else f


class Laplacian(Transformer):
    def sparse_multiply(self, x):
        import torch_sparse

        block, values = self.opt["block"], self.edge_weight
        if block == "attention":
            values = self.attention_weights.mean(dim=1)
        elif block == "mixed":
            values = self.attention_weights
        return torch_sparse.spmm(self.edge_index, values, len(x), len(x), x)

    def forward(self, t, x):
        self.count()
        f = self.coefficient() * (self.sparse_multiply(x) - x)
        assert self.nfe and self.alpha_train is not None
        return f + self.beta_train * self.x0 if self.opt["add_source"] else f


class Sparse:
    """As a module `torch_sparse` among the globals of the field's own module."""

    def __getattr__(self, name):
        import torch_sparse

        return getattr(torch_sparse, name)


torch_sparse = Sparse()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The fields of this file stand for those that are known."""
    for cls, kind in ((Transformer, "transformer"), (Laplacian, "laplacian")):
        product = getattr(cls, fields._METHODS[kind])
        monkeypatch.setitem(fields.FORWARDS, fields.fingerprint(vars(cls)["forward"]), kind)
        monkeypatch.setitem(fields.PRODUCTS, fields.fingerprint(product), kind)


def block(cls, linear, **opt):
    opt = OPT | MORE | opt
    return lambda: _released.Block(cls(opt, edges()), opt, linear).double()


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(
    "opt",
    [{}, {"add_source": False}, {"no_alpha_sigmoid": True}, {"square_plus": True,
      "attention_norm_idx": 1}, {"block": "constant"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cls", [Transformer, Laplacian])
def test_a_known_field_is_one_operator(cls, opt, adjoint):
    make = block(cls, cls is Laplacian, adjoint=adjoint, **opt)
    report, _ = both(make, solver="same" if adjoint else None)
    assert report.used[f"{cls.__name__}, whole field"] > 6 and not report.left
    assert not {SPMM, FUSED} & report.used.keys() and report.used[LAYER]


HOOKS = {"attention": lambda out: (out[0] * 2.0, out[1]), "mixed": lambda out: (out[0].mean(1), 0)}


@pytest.mark.parametrize("name", ["constant", "attention", "mixed"])
def test_weights_that_are_plain(name):
    """Of a layer that is left, or whose weights somebody reads and replaces."""
    hook = HOOKS.get(name)

    def make():
        model = block(Laplacian, True, block=name)()
        if hook is not None:
            model.multihead_att_layer.register_forward_hook(lambda m, a, out: hook(out))
        return model

    for attention in (False, True):
        report, _ = both(make, solver=None, attention=attention)
        assert report.used["Laplacian, whole field"] > 6


def with_shape(name, *shape):
    return lambda f: setattr(f, name, nn.Parameter(torch.rand(shape, dtype=F64)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.opt.update(mix_features=True), "it mixes features"),
        (lambda f: setattr(f, METHOD, f.multiply_attention), f"its {METHOD}"),
        (with_shape("alpha_train", D), "no single numbers"),
        (with_shape("beta_train", D), "no single numbers"),
        (with_shape("alpha_train", 1, 1, 1), "no single numbers"),
        (lambda f: setattr(f, "nfe", 1001), None),
    ],
    ids=["mix", "method", "alpha", "beta", "axes", "nfe"],
)  # fmt: skip
def test_a_field_that_differs_is_left(change, reason):
    made = block(Transformer, False)().odefunc
    made.x0 = X.clone()
    change(made)
    theirs = copy.deepcopy(made) if reason != f"its {METHOD}" else made
    with gf.compat.patch(solver=None) as patch:
        if reason is None:
            with pytest.raises(_released.MaxNFEError):
                made(0.0, X)
            return
        ours = made(0.0, X)
    torch.testing.assert_close(ours, theirs(0.0, X), rtol=1e-10, atol=1e-10)
    assert any(reason in why for _, why in patch.report.left)
    assert "Transformer, whole field" not in patch.report.used


def test_weights_of_another_type_are_left():
    field = block(Laplacian, True, block="constant")().odefunc
    field.x0, field.edge_weight = X.clone(), field.edge_weight.float()
    with gf.compat.patch(solver=None) as patch:
        ours = field(0.0, X)
    torch.testing.assert_close(ours, field(0.0, X))
    reason = "its weights are not [E] of the type of its state"
    assert list(patch.report.left) == [("Laplacian, whole field", reason)] and field.nfe == 2


def test_a_subclass_with_a_product_of_its_own_is_left():
    class Doubled(Transformer):
        def multiply_attention(self, x, attention, v=None):
            return 2 * super().multiply_attention(x, attention, v)

    report, _ = both(block(Doubled, False), solver=None)
    assert list(report.left) == [
        ("Doubled, whole field", f"its {METHOD} is another than the released one")
    ]


@pytest.mark.parametrize(
    "other", [lambda x, edge: (x / 2, edge), lambda x, edge: (x, edge.flip(0))], ids=["x", "edge"]
)
def test_weights_of_another_state_or_graph(monkeypatch, other):
    """As of a layer that is given half of the state it is multiplied by, or edges turned round."""

    class Changed(_released.SpGraphTransAttentionLayer):
        def __call__(self, x, edge):
            return super().__call__(*other(x, edge))

    monkeypatch.setattr(_released, "SpGraphTransAttentionLayer", Changed)
    report, _ = both(block(Transformer, False), solver=None)
    assert report.used["Transformer, whole field"] > 6 and report.used["Changed"]


def test_a_wrapped_product_is_another(monkeypatch):
    """`inspect` gives the source of what a function wraps."""
    theirs = Transformer.multiply_attention
    wrapped = functools.wraps(theirs)(lambda *args: 2 * theirs(*args))
    monkeypatch.setattr(Transformer, METHOD, wrapped)
    report, _ = both(block(Transformer, False), solver=None)
    assert "Transformer, whole field" not in report.used


def test_a_product_by_another_torch_sparse_is_left():
    theirs = Transformer.multiply_attention
    own = types.SimpleNamespace(spmm=lambda *args: 2 * torch_sparse.spmm(*args))
    own = {"torch_sparse": own, "__builtins__": __builtins__}

    class Other(Transformer):
        multiply_attention = types.FunctionType(theirs.__code__, own, METHOD, (None,))

    made = block(Other, False)().odefunc
    made.x0 = X.clone()
    with gf.compat.patch(solver=None) as patch:
        made(0.0, X)
    assert ("Other, whole field", "torch_sparse.spmm is left") in patch.report.left


def test_one_token_makes_another_field():
    def known(self, t, x):
        return [x, t]

    same = known

    def known(self, t, x):  # a comment
        return [x,
                t]  # fmt: skip

    def other(self, t, x):
        return [t, x]

    prints = [fields.fingerprint(f) for f in (known, same, other)]
    assert None not in prints and prints[0] == prints[1] != prints[2]
    assert fields.fingerprint(len) is None
    assert all(len(p) == 64 for p in (*fields.FORWARDS, *fields.PRODUCTS))


def test_fields_can_be_left():
    report, _ = both(block(Transformer, False), solver=None, fields=None)
    assert report.used.keys() == {LAYER, FUSED}
