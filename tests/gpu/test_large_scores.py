"""Scores up to 10⁵ in Triton's interpreter: weights that sum to 1, gradients that cancel."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs Triton's interpreter, in a process of its own: "
        "TRITON_INTERPRET=1 pytest tests/gpu/test_large_scores.py",
        allow_module_level=True,
    )

from ._large_scores import SCORES, WEIGHTINGS, Case

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)
each_size = pytest.mark.parametrize("largest", SCORES, ids=lambda s: f"{s:.0e}")


@each_size
@each_weighting
def test_edge_attention(weighting, largest):
    case = Case(*WEIGHTINGS[weighting], largest)
    case.check_edge_attention(case.run_edge_attention())


@each_size
@each_weighting
def test_attention_diffusion(weighting, largest):
    case = Case(*WEIGHTINGS[weighting], largest)
    case.check_attention_diffusion(case.run_attention_diffusion())
