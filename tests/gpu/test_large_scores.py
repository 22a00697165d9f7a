"""Scores up to 10⁵ in Triton's interpreter: weights that sum to 1, gradients that cancel."""

import functools
import math

import pytest
import torch
from torch.autograd import grad

from ._mode import INTERPRETED, skip_module

if not INTERPRETED:
    skip_module(__file__)

from grand_fast.kernels.gpu import pieces
from grand_fast.kernels.weighting import scaled_dot
from grand_fast.ops import projected_attention_diffusion

from ._large_scores import NODES, PIECE_EDGES, SCORES, WEIGHTINGS, Case, assert_near

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    # 2ˢ where there is no edge, and 1 / Σ p of a row without any
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# One size and one operator each, by turns; the other, and more sizes, as compiled code
TURNS = [(name, SCORES[i % len(SCORES)]) for i, name in enumerate(WEIGHTINGS)]


@pytest.mark.parametrize(("weighting", "largest"), TURNS[1::2])
def test_edge_attention(weighting, largest):
    case, mean_heads = Case(*WEIGHTINGS[weighting], largest), largest == SCORES[-1]
    got = case.run_edge_attention(mean_heads=mean_heads)
    case.check_edge_attention(got, mean_heads=mean_heads)


@pytest.mark.parametrize(("weighting", "largest"), TURNS[::2])
def test_attention_diffusion(weighting, largest):
    case = Case(*WEIGHTINGS[weighting], largest)
    case.check_attention_diffusion(case.run_attention_diffusion())


def test_half_type():
    case = Case(*WEIGHTINGS["paper"], SCORES[2], dtype=torch.float16)
    case.check_edge_attention(case.run_edge_attention())
    case.check_attention_diffusion(case.run_attention_diffusion())


@pytest.mark.parametrize("largest", SCORES[::3], ids=lambda s: f"{s:.0e}")
def test_keys_that_are_the_state(largest, monkeypatch):
    """Backward then gets a shift that is right but for roundings, and the sum of other scores."""
    monkeypatch.setattr(pieces, "plan", functools.partial(pieces.plan, piece_edges=PIECE_EDGES))
    d = 8
    case = Case(scaled_dot(d), False, (1, d), largest, d=d)
    weight, bias = torch.randn(2 * d, d), torch.randn(2 * d)
    for _ in range(2):  # once for the factor, once with it
        case.q, case.k = ((case.x @ weight.T + bias)[:, None, part : part + d] for part in (0, d))
        factor = math.sqrt(largest / float(case.scores().abs().max()))
        weight, bias = factor * weight, factor * bias
    results = []
    for backend, dtype in (
        ("gpu", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in (case.x, weight, bias)]
        f = projected_attention_diffusion(*leaves, case.graph, heads=1, backend=backend)
        results.append([f, *grad(f, leaves, case.df.to(dtype))])
    # what the terms of a score of W_kᵀ q and x add up to
    w_q, w_k = (w.double().abs() for w in weight.chunk(2))
    x, b_q = case.x.double().abs(), bias[:d].double().abs()
    terms = float(((x @ w_q.T + b_q) @ w_k @ x.T).max()) / math.sqrt(d)
    case.alpha = torch.ones(d)
    sizes = case.sizes(case.weight_gradients())
    of_qk, of_x = max(sizes["dq"], sizes["dk"]), float(x.max())
    of_weight = NODES * of_qk * of_x
    of_dx = sizes["dx"] + d * of_qk * float(weight.abs().max())
    names = ("f", "dx", "dweight", "dbias")
    for name, got, plain, want, size in zip(
        names, *results, (sizes["f"], of_dx, of_weight, NODES * of_qk), strict=True
    ):
        assert_near(name, got, plain, want, terms, size)
