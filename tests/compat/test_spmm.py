"""`torch_sparse.spmm` by our kernel: what it takes, and what it leaves to theirs."""

import pytest
import torch

import grand_fast as gf
from grand_fast.compat.graphs import graph_of
from grand_fast.testing import assert_close
from tests.compat._released import F64, N, edges

SPMM = "torch_sparse.spmm"
E = edges().shape[1]


def call(*args):
    import torch_sparse

    return torch_sparse.spmm(*args)


def patched(*args):
    with gf.compat.patch() as patch:
        return call(*args), patch.report


@pytest.mark.parametrize("shape", [(N, 3), (N, 1), (N,)], ids=str)
def test_values_and_gradients(shape):
    value = torch.randn(E, dtype=F64, requires_grad=True)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    args = (edges(), value, N, N, x)
    ours, report = patched(*args)
    assert report.used == {SPMM: 1} and not report.left
    pairs = [(ours, call(*args))]
    direction = torch.randn_like(ours)
    for first, second in zip(
        *(torch.autograd.grad((y * direction).sin().sum(), (value, x), create_graph=True)
          for y in pairs[0]), strict=True,
    ):  # fmt: skip
        pairs.append((first, second))
    second = [torch.autograd.grad(g.sin().sum(), (value, x)) for g in (pairs[1][0], pairs[1][1])]
    pairs += zip(*second, strict=True)
    for i, (a, b) in enumerate(pairs):
        assert_close(str(i), a, b)


def test_mixed_types_and_a_strided_matrix():
    value, x = torch.rand(E, dtype=F64), torch.rand(4, N).t()
    ours, _ = patched(edges(), value, N, N, x)
    assert ours.dtype is F64
    assert_close("y", ours, call(edges(), value, N, N, x))


LEFT = {
    "not square": ((edges(), torch.rand(E), N + 1, N, torch.rand(N, 2)), "not square"),
    "integers": ((edges(), torch.ones(E).long(), N, N, torch.ones(N, 2).long()), "not floating"),
    "a batch": ((edges(), torch.rand(E), N, N, torch.rand(2, N, 3)), "not square"),
}


@pytest.mark.parametrize(("args", "reason"), LEFT.values(), ids=LEFT)
def test_the_rest_is_theirs(args, reason):
    ours, report = patched(*args)
    assert torch.equal(ours, call(*args)) and not report.used
    [(_, why)] = report.left
    assert reason in why


@pytest.mark.parametrize(
    "args",
    [
        (edges(), torch.rand(E - 1), N, N, torch.rand(N, 2)),
        (edges() + 3, torch.rand(E), N, N, torch.rand(N, 2)),
        (edges(), "values", N, N, torch.rand(N, 2)),
    ],
    ids=["lengths", "ids", "types"],
)
def test_an_error_is_the_same(args):
    with pytest.raises(Exception) as theirs:
        call(*args)
    with pytest.raises(type(theirs.value)) as ours:
        patched(*args)
    assert str(ours.value) == str(theirs.value)


def test_edges_that_change_and_edges_that_are_copied():
    edge, value, x = edges(), torch.rand(E, dtype=F64), torch.rand(N, 2, dtype=F64)
    with gf.compat.patch():
        call(edge, value, N, N, x)
        edge[1] = edge[1].flip(0)
        ours = call(edge, value, N, N, x)
        first = graph_of(edge, N)
        assert graph_of(edge.clone(), N) is first is graph_of(edge, N)
        assert graph_of(edge, N + 1) is not first
        edge.data = edges(seed=5)
        assert_close("y", call(edge, value, N, N, x), call(edges(seed=5), value, N, N, x))
        with torch.inference_mode():
            diagonal = torch.arange(N).expand(2, N).clone()
            assert_close("x", call(diagonal, torch.ones(N, dtype=F64), N, N, x), x)
            diagonal[1] = diagonal[1].roll(1)
            rolled = call(diagonal, torch.ones(N, dtype=F64), N, N, x)
            assert_close("rolled", rolled, x.roll(1, 0))
    edge = edges()
    edge[1] = edge[1].flip(0)
    assert_close("y", ours, call(edge, value, N, N, x))
