"""Scores up to 10⁵ in Triton's interpreter: weights that sum to 1, gradients that cancel."""

import functools
import math
import os

import pytest
import torch
from torch.autograd import grad

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs Triton's interpreter, in a process of its own: "
        "TRITON_INTERPRET=1 pytest tests/gpu/test_large_scores.py",
        allow_module_level=True,
    )

from grand_fast.kernels.gpu import pieces
from grand_fast.kernels.weighting import scaled_dot
from grand_fast.ops import projected_attention_diffusion

from ._large_scores import (
    NODES,
    PIECE_EDGES,
    SCORES,
    WEIGHTINGS,
    Case,
    assert_near,
)

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    # 2ˢ where there is no edge, and 1 / Σ p of a row without any
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# Two sizes each; the largest of all for each as compiled code
each_case = pytest.mark.parametrize(
    ("weighting", "largest"),
    [(name, size) for i, name in enumerate(WEIGHTINGS) for size in SCORES[i % 2 :: 2]],
)
each_size = pytest.mark.parametrize("largest", SCORES, ids=lambda s: f"{s:.0e}")


@each_case
def test_edge_attention(weighting, largest):
    case, mean_heads = Case(*WEIGHTINGS[weighting], largest), largest == SCORES[-1]
    got = case.run_edge_attention(mean_heads=mean_heads)
    case.check_edge_attention(got, mean_heads=mean_heads)


@each_case
def test_attention_diffusion(weighting, largest):
    case = Case(*WEIGHTINGS[weighting], largest)
    case.check_attention_diffusion(case.run_attention_diffusion())


@pytest.mark.parametrize("weighting", ("paper, one head", "sender"))
def test_the_gradient_by_the_state_alone(weighting):
    """Its pass has nothing but what forward found."""
    case = Case(*WEIGHTINGS[weighting], SCORES[-1])
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
    got = case.run_attention_diffusion()
    has_edges = case.graph.rowptr.diff() > 0
    for name in ("f", "dx"):
        a = got[name] + torch.eye(NODES)
        total = a.sum(1 if name == "f" else 0)[has_edges]
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types(dtype):
    case = Case(*WEIGHTINGS["paper"], SCORES[2], dtype=dtype)
    case.check_edge_attention(case.run_edge_attention())
    case.check_attention_diffusion(case.run_attention_diffusion())


@each_size
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
