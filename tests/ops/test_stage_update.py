"""Every backend of stage_update against the reference, forward and backward."""

import pytest
import torch

from grand_fast.kernels.stage_update import cpu
from grand_fast.kernels.stage_update.reference import cost, stage_update_fwd
from grand_fast.ops import stage_update
from grand_fast.testing import assert_close

from ._problems import compare, normal

SCALES = (1.0, -0.5, 2.0, 0.125, -3.0, 1.0, 1e-3, 0.75)
SHAPES = [(7, 5), (1,), (), (0, 3), (3, 0, 2), (16,), (33, 31), (2, 3, 4, 5)]
# More than one task, more than one register, and an end that fills neither
LONG = (3, 43_691)


def inputs(shape, terms):
    return {f"y{s}": normal(*shape, seed=s) for s in range(terms)}


def call(backend, **tensors):
    return stage_update(list(zip(SCALES, tensors.values(), strict=False)), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(shape, dtype, backend, nan_filled):
    compare(call, inputs(shape, 4), backend=backend, dtype=dtype)


@pytest.mark.parametrize("terms", range(1, 9))
def test_number_of_terms(terms, backend, nan_filled):
    compare(call, inputs((9, 13), terms), backend=backend, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _kernels_of_any_size(monkeypatch):
    """Not only where they are faster than torch."""
    monkeypatch.setattr(cpu, "_LARGE_BYTES", 0)


@pytest.mark.parametrize("large", [0, 1 << 40], ids=["kernel", "torch"])
def test_many_tasks(monkeypatch, large, nan_filled):
    monkeypatch.setattr(cpu, "_LARGE_BYTES", large)
    compare(call, inputs(LONG, 3), backend="cpu", dtype=torch.float32)


def test_the_equation():
    y = inputs((4, 3), 3)
    want = y["y0"] - 0.5 * y["y1"] + 2.0 * y["y2"]
    assert_close("y", stage_update_fwd(list(y.values()), SCALES[:3]), want)


def test_half_precision_rounds_once():
    tensors = [t.to(torch.bfloat16) for t in inputs((50, 7), 5).values()]
    y = stage_update(list(zip(SCALES, tensors, strict=False)), backend="reference")
    want = stage_update_fwd([t.double() for t in tensors], SCALES[:5])
    assert y.dtype == torch.bfloat16
    assert ((y.double() - want).abs() <= want.abs() * 2.0**-8).all()


def test_one_tensor_twice(backend):
    x = normal(6, 5).requires_grad_()
    y = stage_update([(2.0, x), (1.0, x), (-0.5, x)], backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert_close("y", y, 2.5 * x)
    assert_close("dx", dx, 2 * 2.5**2 * x)


def test_strided_tensors(backend):
    x = normal(12, 10)
    terms = [(1.5, x[::2, ::2]), (-1.0, x.T[:5, :6].T), (0.5, x[0, 0].expand(6, 5))]
    want = 1.5 * terms[0][1] - terms[1][1] + 0.5 * terms[2][1]
    assert_close("y", stage_update(terms, backend=backend), want)


def test_only_the_gradients_that_are_needed(backend):
    tensors = [normal(5, 4, seed=s).requires_grad_(s in (0, 2)) for s in range(4)]
    y = stage_update(list(zip(SCALES, tensors, strict=False)), backend=backend)
    y.sum().backward()
    grads = [t.grad for t in tensors]
    assert grads[1] is None and grads[3] is None
    assert (grads[0] == 1.0).all() and (grads[2] == 2.0).all()


def test_gradcheck(backend):
    tensors = tuple(normal(3, 2, seed=s).requires_grad_() for s in range(4))

    def run(*tensors):
        return stage_update(list(zip(SCALES, tensors, strict=False)), backend=backend)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(lambda *t: run(*t).square(), tensors)


def test_transforms_of_torch_func(backend):
    x, y, v = (normal(4, 3, seed=s) for s in range(3))

    def run(x):
        return stage_update([(2.0, x), (0.5, y)], backend=backend).square()

    want = 2 * (2 * x + 0.5 * y) * 2 * v
    assert_close("jvp", torch.func.jvp(run, (x,), (v,))[1], want)
    assert_close("vjp", torch.func.vjp(run, x)[1](v)[0], want)
    rows = torch.func.vmap(lambda x: stage_update([(2.0, x), (1.0, x)], backend=backend))(x)
    assert_close("vmap", rows, 3 * x)
    assert torch.autograd.gradcheck(run, x.requires_grad_(), check_forward_ad=True)


def test_the_result_is_a_new_tensor(backend):
    x = normal(4, 4)
    y = stage_update([(1.0, x)], backend=backend)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


def test_specials_spread_as_in_torch(backend):
    a = torch.tensor([1.0, float("inf"), float("nan"), -float("inf"), 2.0])
    b = torch.tensor([float("nan"), 1.0, 1.0, float("inf"), 3.0])
    y = stage_update([(0.0, a), (1.0, b)], backend=backend)
    assert_close("y", y, (0.0 * a + b).double())


def test_repeatable_for_any_number_of_threads():
    tensors = [t.float() for t in inputs(LONG, 5).values()]
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(stage_update(list(zip(SCALES, tensors, strict=False)), backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[1], runs[2])


def test_cost():
    assert cost(elements=10, terms=3, element_bytes=4).bytes_min == 4 * 10 * 4
    assert cost(elements=10, terms=3, element_bytes=4).flops == 60


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("terms", "error", "match"),
    [
        ([], ValueError, r"stage_update: `terms` must hold at least one pair .*, got none"),
        (X, ValueError, r"`terms` must hold at least one pair .*, got Tensor"),
        ([X], TypeError, r"`terms\[0\]` must be a pair \(float, Tensor\), got Tensor"),
        ([(1.0, X, X)], TypeError, r"`terms\[0\]` must be a pair"),
        ([(True, X)], TypeError, r"`terms\[0\]\[0\]` must be a float, got bool"),
        ([(X[0, 0], X)], TypeError, r"must be a float, got Tensor. Take .item\(\)"),
        ([(1.0, X), (float("nan"), X)], ValueError, r"`terms\[1\]\[0\]` must be finite, got nan"),
        ([(1.0, 2.0)], TypeError, r"`terms\[0\]\[1\]` must be a Tensor, got float"),
        ([(1.0, X.long())], TypeError, r"`terms\[0\]\[1\]` must be floating"),
        ([(1.0, X), (1.0, X[:1])], ValueError, r"`terms\[1\]\[1\]` .* = \[2, 3\], got \[1, 3\]"),
        ([(1.0, X), (1.0, X.double())], TypeError, r"must be torch.float32.* Convert it with"),
        ([(1.0, X), (1.0, X.to("meta"))], ValueError, r"must be on cpu, got meta. Move it with"),
    ],
)
def test_bad_input(terms, error, match):
    with pytest.raises(error, match=match):
        stage_update(terms)
