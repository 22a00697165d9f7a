"""Scores up to 10⁵ in the compiled kernels, run as PTX."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "needs Triton's compiler: unset TRITON_INTERPRET and run "
        "pytest tests/gpu/test_large_scores_compiled.py",
        allow_module_level=True,
    )

from tests.gpu.ptx.emulator import emulated

from ._large_scores import WEIGHTINGS, Case

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_filled")]

LARGEST = 1e5
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)


@each_weighting
def test_edge_attention(weighting):
    case = Case(*WEIGHTINGS[weighting], LARGEST)
    with emulated("sm_80"):
        got = case.run_edge_attention()
    case.check_edge_attention(got)


@each_weighting
def test_attention_diffusion(weighting):
    case = Case(*WEIGHTINGS[weighting], LARGEST)
    with emulated("sm_80"):
        got = case.run_attention_diffusion()
    case.check_attention_diffusion(got)
