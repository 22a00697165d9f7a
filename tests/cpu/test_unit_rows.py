"""The CPU backend's vectors of length 1 and their backward, against float64."""

import pytest
import torch
from torch.nn import functional

from grand_fast.kernels.cpu.unit_rows import unit_rows_bwd, unit_rows_fwd
from grand_fast.testing import assert_close

EPS = 1e-5
SHAPES = [(0, 2, 3), (1, 1, 1), (7, 3, 5), (300, 1, 16), (50, 2, 33), (9, 2, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, nan_filled):
    n, h, d_k = shape
    v = torch.randn(n, 2, h, d_k, dtype=dtype)[:, 1]  # rows that lie apart
    if n > 1:
        v[0], v[1] = 0.0, 1e-7  # shorter than eps
    grad = torch.randn(n, h, d_k, dtype=dtype)
    exact = v.detach().double().requires_grad_()
    want = functional.normalize(exact, dim=2, eps=EPS)
    (dv,) = torch.autograd.grad(want, exact, grad.double())
    unit = unit_rows_fwd(v, eps=EPS)
    assert_close("unit", unit, want.detach())
    unit_rows_bwd(grad, v, unit, eps=EPS)
    assert_close("dv", grad, dv)


def test_what_is_no_number_stays_so():
    v = torch.ones(3, 1, 4)
    v[1, 0, 2] = torch.nan
    assert unit_rows_fwd(v, eps=EPS).isnan().all(2).flatten().tolist() == [False, True, False]
