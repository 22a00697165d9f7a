"""Every backend of error_ratio against the reference, and the reference against its formula."""

import math

import pytest
import torch

from grand_fast.kernels.error_ratio import cpu
from grand_fast.kernels.error_ratio.reference import cost
from grand_fast.ops import error_ratio
from grand_fast.testing import TOLERANCE

from ._problems import normal

SCALES = (0.25, -0.5, 2.0, 0.125, -3.0, 1.0, 1e-3)
# More than one task, more than one register, and an end that fills neither
SHAPES = [(1,), (), (7, 5), (33, 31), (3, 43_691)]


@pytest.fixture(autouse=True)
def _kernels_of_any_size(monkeypatch):
    """Not only where they are faster than torch."""
    monkeypatch.setattr(cpu, "_SMALL", 0)


def problem(shape, terms, dtype):
    pairs = [(SCALES[s], normal(*shape, seed=s).to(dtype)) for s in range(terms)]
    return pairs, normal(*shape, seed=50).to(dtype), normal(*shape, seed=51).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("terms", [1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape, terms, dtype, backend, nan_filled):
    pairs, x, y = problem(shape, terms, dtype)
    got = error_ratio(pairs, x, y, rtol=1e-2, atol=1e-3, backend=backend)
    error = sum(c * f.double() for c, f in pairs)
    allowed = 1e-3 + 1e-2 * torch.max(x.double().abs(), y.double().abs())
    want = float(((error / allowed) ** 2).mean().sqrt())
    assert got.dtype == dtype and got.dim() == 0
    assert float(got) == pytest.approx(want, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_error_that_is_not_finite_shows(bad, backend):
    pairs, x, y = problem((40, 3), 2, torch.float32)
    pairs[1][1][7, 1] = bad
    assert not math.isfinite(error_ratio(pairs, x, y, rtol=1e-3, atol=1e-6, backend=backend))


def test_one_tolerance_may_be_zero(backend):
    pairs, x, y = problem((40, 3), 2, torch.float64)
    one, two = (error_ratio(pairs, x, y, rtol=0.0, atol=a, backend=backend) for a in (1e-3, 2e-3))
    assert float(one) == pytest.approx(2 * float(two), rel=1e-12)
    assert math.isfinite(error_ratio(pairs, x, y, rtol=1e-3, atol=0.0, backend=backend))


def test_any_number_of_threads_gives_the_same_bits():
    pairs, x, y = problem((70_000, 5), 3, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(float(error_ratio(pairs, x, y, rtol=1e-3, atol=1e-6, backend="cpu")))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_an_empty_state_has_no_error(backend):
    empty = torch.empty(0, 3)
    assert float(error_ratio([(1.0, empty)], empty, empty, rtol=1e-3, atol=0.0)) == 0


def test_no_gradient():
    pairs, x, y = problem((4, 3), 2, torch.float64)
    ratio = error_ratio(pairs, x.requires_grad_(), y, rtol=1e-3, atol=1e-6)
    assert not ratio.requires_grad


@pytest.mark.parametrize(
    ("rtol", "atol"), [(0.0, 0.0), (-1e-3, 1e-3), (1e-3, -1.0), (math.nan, 1.0)]
)
def test_bad_tolerances(rtol, atol):
    pairs, x, y = problem((4, 3), 2, torch.float64)
    with pytest.raises(ValueError, match=r"error_ratio: `rtol, atol` must be at least 0"):
        error_ratio(pairs, x, y, rtol=rtol, atol=atol)


def test_bad_shapes():
    pairs, x, y = problem((4, 3), 2, torch.float64)
    with pytest.raises(ValueError, match=r"error_ratio: `y` must have shape"):
        error_ratio(pairs, x, y[:2], rtol=1e-3, atol=0.0)


def test_cost():
    assert cost(elements=100, terms=6, element_bytes=4).bytes_min == 4 * 100 * 8
