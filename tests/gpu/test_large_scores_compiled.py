"""Scores up to 10⁵ in the compiled kernels, run as PTX: weights that sum to 1 in both passes."""

import pytest
import torch

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from tests.gpu.ptx.emulator import emulated

from ._large_scores import NODES, SCORES, WEIGHTINGS, Case

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_filled")]

# The largest of all for each, and two others by turns
CASES = [
    (name, size)
    for i, name in enumerate(WEIGHTINGS)
    for size in sorted({*SCORES[i % 2 :: 2], SCORES[-1]})
]
OF_EDGES = [case for case in CASES if case[0] in list(WEIGHTINGS)[::2]]  # others: interpreted


@pytest.mark.parametrize(("weighting", "largest"), OF_EDGES)
def test_edge_attention(weighting, largest):
    case = Case(*WEIGHTINGS[weighting], largest)
    with emulated("sm_80"):
        got = case.run_edge_attention()
    case.check_edge_attention(got)


@pytest.mark.parametrize(("weighting", "largest"), CASES)
def test_attention_diffusion(weighting, largest):
    case = Case(*WEIGHTINGS[weighting], largest, d=NODES)
    with emulated("sm_80"):
        got = case.run_attention_diffusion()
    case.check_attention_diffusion(got)


@pytest.mark.parametrize("weighting", ("paper, one head", "sender"))
def test_the_gradient_by_the_state_alone(weighting):
    """Its pass has nothing but what forward found."""
    case = Case(*WEIGHTINGS[weighting], SCORES[-1], d=NODES)
    with emulated("sm_80"):
        got = case.run_attention_diffusion(needs_dqk=False)
    assert got.keys() == {"f", "norm", "dx"}
    case.check_attention_diffusion(got)


@pytest.mark.parametrize("weighting", ("paper", "paper, one head", "squareplus"))
def test_weights_of_both_passes_sum_to_1(weighting):
    """Of forward and of the column pass, which gathers what the row pass summed."""
    case = Case(*WEIGHTINGS[weighting], SCORES[-1], d=NODES)
    # f and dx are then the weights of forward, and those of the column pass transposed
    case.x = case.df = torch.eye(NODES)
    case.alpha = torch.ones(NODES)
    with emulated("sm_80"):
        got = case.run_attention_diffusion()
    has_edges = case.graph.rowptr.diff() > 0
    for name in ("f", "dx"):
        a = got[name] + torch.eye(NODES)
        total = a.sum(1 if name == "f" else 0)[has_edges]
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_half_type():
    """float16 in the interpreter, which cuts bfloat16 off instead of rounding it."""
    case = Case(*WEIGHTINGS["paper"], SCORES[2], dtype=torch.bfloat16)
    with emulated("sm_80"):
        case.check_edge_attention(case.run_edge_attention())
        case.check_attention_diffusion(case.run_attention_diffusion())
