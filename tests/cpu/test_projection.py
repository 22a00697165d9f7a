"""The CPU backend's projections and their backward against float64."""

import pytest
import torch

from grand_fast.kernels.cpu import dense
from grand_fast.testing import assert_close

SIZES = [(0, 5, 4), (1, 3, 2), (7, 128, 256), (200, 162, 64), (1000, 33, 130), (300, 1, 1)]


@pytest.fixture(params=["wide registers", "narrow registers"])
def registers(request, monkeypatch):
    """Tiles for machines with and without registers of 512 bits."""
    monkeypatch.setattr(dense, "has_wide_registers", lambda: request.param == "wide registers")
    yield
    _clear()


def _clear():
    dense._product_kernel.cache_clear()
    dense._gradient_kernel.cache_clear()


def _problem(n, c, m, dtype):
    return [torch.randn(*size, dtype=dtype) for size in ((n, c), (m, c), (m,), (n, m), (n, c))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "c", "m"), SIZES)
def test_against_float64(n, c, m, dtype, registers, nan_filled):
    _clear()
    x, weight, bias, dy, dx = _problem(n, c, m, dtype)
    x64, weight64, dy64 = x.double(), weight.double(), dy.double()
    want = dx.double() + dy64 @ weight64
    assert_close("y", dense.Projection(weight, bias)(x), x64 @ weight64.t() + bias.double())
    dense.add_input_gradient(dx, dy, weight)
    assert_close("dx", dx, want)
    dweight, dbias = dense.parameter_gradients(dy, x)
    assert_close("dweight", dweight, dy64.t() @ x64)
    assert_close("dbias", dbias, dy64.sum(0))


def test_strided_rows_and_weights():
    x, weight, bias, dy, _ = _problem(50, 20, 24, torch.float64)
    wide = torch.randn(50, 64, dtype=torch.float64)
    wide[:, :20] = x
    turned = weight.t().contiguous().t()
    y = dense.Projection(turned, bias)(wide[:, :20])
    assert_close("y", y, x @ weight.t() + bias)
    dweight, _ = dense.parameter_gradients(dy, wide[:, :20])
    assert_close("dweight", dweight, dy.t() @ x)


def test_bitwise_equal_for_any_number_of_threads():
    x, weight, bias, dy, dx = _problem(5000, 40, 48, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dx_out = dx.clone()
            dense.add_input_gradient(dx_out, dy, weight)
            gradients = dense.parameter_gradients(dy, x)
            results.append((dense.Projection(weight, bias)(x), dx_out, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
