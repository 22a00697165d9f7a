"""Features in CSR: the same model as of dense ones, at the cost of their nonzeros."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

import grand_fast as gf
from grand_fast.data.features import compact
from grand_fast.nn import GRAND, encoder
from grand_fast.nn.encoder import sparse_linear
from grand_fast.testing import assert_close, random_graph

F = 12


def features(kind, dtype=torch.float64):
    x = torch.randn(40, F, dtype=dtype) * (torch.rand(40, F) < 0.2)
    if kind == "empty_rows":
        x[[0, 5, 6, 7, 39]] = 0
    elif kind == "empty_columns":
        x[:, [0, 4, 5, F - 1]] = 0
    elif kind == "hub":
        x[3], x[:, 3] = 1.0, 2.0
    elif kind == "one_column":
        x = x[:, :1] + (torch.arange(40) % 3 == 0)[:, None]
    elif kind == "no_nonzeros":
        x = torch.zeros_like(x)
    elif kind == "no_nodes":
        x = x[:0]
    csr = x.to_sparse_csr()
    if kind == "stored_zeros":
        csr.values()[::3] = 0
    if kind == "int32":
        csr = torch.sparse_csr_tensor(
            csr.crow_indices().int(),
            csr.col_indices().int(),
            csr.values(),
            size=x.shape,
            check_invariants=True,
        )
    return csr


KINDS = (
    "random", "empty_rows", "empty_columns", "hub", "one_column", "no_nonzeros", "no_nodes",
    "stored_zeros", "int32",
)  # fmt: skip


def gradients(y, layer):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return torch.autograd.grad((y * weights).sum(), list(layer.parameters()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_dense_layer(kind, dropout, bias):
    """Under the same mask of the values, forward and all gradients."""
    x = features(kind)
    layer = nn.Linear(x.shape[1], 5, bias=bias, dtype=torch.float64)
    torch.manual_seed(1)
    got = sparse_linear(x, layer, dropout=dropout, training=True)
    torch.manual_seed(1)
    kept = functional.dropout(x.values(), dropout)
    same = torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), kept, size=x.shape,
                                   check_invariants=True)  # fmt: skip
    want = layer(same.to_dense())
    assert_close("y", got, want)
    for name, g, w in zip(("dw", "db"), gradients(got, layer), gradients(want, layer), strict=bias):
        assert_close(name, g, w)


def test_dropout_is_that_of_all_elements():
    x = torch.ones(300, 400).triu().to_sparse_csr()
    layer = nn.Linear(400, 400, bias=False)
    nn.init.eye_(layer.weight)
    y = sparse_linear(x, layer, dropout=0.3, training=True)
    stored = y[x.to_dense() == 1]
    dropped = float((stored == 0).double().mean())
    assert dropped == pytest.approx(0.3, abs=0.01)
    assert_close("kept", stored[stored != 0], torch.full_like(stored[stored != 0], 1 / 0.7))
    assert not y[x.to_dense() == 0].any()
    assert torch.equal(sparse_linear(x, layer, dropout=0.3, training=False), x.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    x = features("hub", torch.float32).to(dtype)
    layer = nn.Linear(F, 5, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    got = sparse_linear(x, layer, dropout=0.0, training=True)
    want = exact(x.to_dense().double())
    assert got.dtype == dtype
    assert_close("y", got, want)
    dy = torch.randn(40, 5, dtype=dtype)
    got.backward(dy)
    want.backward(dy.double())
    assert_close("dw", layer.weight.grad, exact.weight.grad)


@pytest.mark.parametrize("kind", ["random", "empty_rows"])
def test_second_derivatives(kind):
    x = features(kind)

    def call(weight, bias):
        layer = nn.Linear(F, 2, dtype=torch.float64)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        return sparse_linear(x, layer, dropout=0.0, training=True).sin()

    weight = torch.randn(2, F, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (weight, bias))
    assert torch.autograd.gradgradcheck(call, (weight, bias))


@pytest.mark.parametrize("variant", ["l", "nl", "laplacian"])
def test_the_model_is_that_of_dense_features(variant):
    graph, x = random_graph("hub"), features("empty_rows")
    model = GRAND(F, 6, 3, variant=variant, heads=2, T=2.0, source=True, mlp=True).double()
    results = []
    for given in (x, x.to_dense()):
        logits = model(given, graph)
        grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *grads, *(y for _, y in model.trajectory(given, graph, 3.0))])
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        name = names[index] if index < len(names) else "trajectory"
        if name == "field.key.bias":  # zero but for rounding
            assert got.abs().max() < 1e-10
        else:
            assert_close(name, got, want, tolerance=1e-10)


def test_autocast():
    graph, x = random_graph("random"), features("random", torch.float32)
    model = GRAND(F, 6, 3, T=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = model(x, graph), model(x.to_dense(), graph)
    assert_close("logits", got, want, tolerance=5e-2)
    got.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_compile():
    graph, x = random_graph("random"), features("random", torch.float32)
    model = GRAND(F, 6, 3, T=2.0, input_dropout=0.5)
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for call in (model, compiled):
        torch.manual_seed(0)
        logits = call(x, graph)
        found.append([logits, *torch.autograd.grad(logits.sum(), list(model.encoder.parameters()))])
    for got, want in zip(*found, strict=True):
        assert_close("compiled", got, want)


def test_two_runs_agree_bit_for_bit():
    x = (torch.rand(3000, 200) < 0.05).float().to_sparse_csr()
    layer = nn.Linear(200, 16)
    found = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        y = sparse_linear(x.clone(), layer, dropout=0.5, training=True)
        found.append([y, *gradients(y, layer)])
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])


@pytest.mark.parametrize("kind", ["random", "int32"])
def test_the_transpose_is_found_once_and_freed(kind, monkeypatch):
    made = []
    real = encoder._csr_pair
    monkeypatch.setattr(encoder, "_csr_pair", lambda x: made.append(1) or real(x))
    x, layer = features(kind), nn.Linear(F, 3, dtype=torch.float64)
    before = len(encoder._known)
    for _ in range(3):
        sparse_linear(x, layer, dropout=0.5, training=True).sum().backward()
    assert len(made) == 1 and len(encoder._known) == before + 1
    del x
    gc.collect()
    assert len(encoder._known) == before
    with torch.inference_mode():
        x = features("random")
        want = layer(x.to_dense())
        assert_close("y", sparse_linear(x, layer, dropout=0.0, training=False), want)
    assert len(encoder._known) == before


def test_values_changed_in_place_count():
    x, layer = features("random"), nn.Linear(F, 3, dtype=torch.float64)
    for _ in range(2):
        y = sparse_linear(x, layer, dropout=0.0, training=True)
        assert_close("y", y, layer(x.to_dense()))
        want = gradients(layer(x.to_dense()), layer)[0]
        assert_close("dw", gradients(y, layer)[0], want)
        x.values().mul_(3.0)


BAD = {
    "coo": (lambda x: x.to_sparse_coo(), TypeError, "dense or torch.sparse_csr, got torch"),
    "csc": (lambda x: x.to_sparse_csc(), TypeError, "x.to_sparse_csr()"),
    "width": (lambda x: features("one_column", torch.float32), ValueError,
              r"\[N, in_channels\] = \[N, 12\], got \[40, 1\]"),
    "batch": (lambda x: x.to_dense().expand(2, -1, -1).bool().float().to_sparse_csr(), ValueError,
              r"must have shape \[N, in_channels\]"),
    "dtype": (lambda x: x.double(), TypeError, "must be torch.float32, .*, got torch.float64"),
    "device": (lambda x: x.to("meta"), ValueError, "must be on cpu, like the weights, got meta"),
    "gradient": (lambda x: x.clone().requires_grad_(), NotImplementedError, "x.detach()"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_features(name):
    change, error, text = BAD[name]
    x = change(features("random", torch.float32))
    with pytest.raises(error, match=f"^GRAND: `x` .*{text}"):
        sparse_linear(x, nn.Linear(F, 3), dropout=0.0, training=True)


def test_features_are_sparse_up_to_a_fifth_of_nonzeros():
    """As the encoder is then no slower; a denser table is read as it is."""
    for nonzeros, is_sparse in ((0, True), (199, True), (200, True), (201, False), (1000, False)):
        x = torch.zeros(1000)
        x[:nonzeros] = 1.0
        x = x.view(100, 10)
        got = compact(x)
        assert (got.layout is torch.sparse_csr) is is_sparse, nonzeros
        assert torch.equal(got.to_dense(), x)


def test_indices_are_of_32_bits_while_they_fit(monkeypatch):
    layer = nn.Linear(F, 3, dtype=torch.float64)
    for limit, index in ((2**31 - 1, torch.int32), (F, torch.int64)):
        monkeypatch.setattr(encoder, "_INT32_MAX", limit)
        x = features("random")
        pair = encoder.csr_pair(x)
        assert {t.dtype for csr in pair for t in csr if t is not None} == {index}
        y = sparse_linear(x, layer, dropout=0.0, training=True)
        assert_close("y", y, layer(x.to_dense()))
        want = gradients(layer(x.to_dense()), layer)[0]
        assert_close("dw", gradients(y, layer)[0], want)


def test_the_model_checks_its_features():
    graph, model = random_graph("random"), GRAND(F, 4, 2)
    x = features("random", torch.float32)
    with pytest.raises(TypeError, match="GRAND: `x` must be dense or torch.sparse_csr"):
        model(x.to_sparse_coo(), graph)
    model.encoder = nn.Sequential(nn.Linear(F, 7), nn.Tanh(), nn.Linear(7, 4))
    assert_close("logits", model(x, graph), model(x.to_dense(), graph).double())


def test_a_graph_without_nodes():
    graph = gf.Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 0)
    model = GRAND(F, 4, 2).double()
    logits = model(features("no_nodes"), graph)
    logits.sum().backward()
    assert logits.shape == (0, 2) and not model.encoder.weight.grad.any()
