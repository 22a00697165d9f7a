"""Gradients of every scheme against finite differences, by all that a diffusion depends on."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import grand_fast as gf
from grand_fast.nn.terms import LinearDiffusion, NonlinearDiffusion
from grand_fast.solvers import ADAPTIVE, METHODS, ExplicitAdams, ImplicitAdams, SemiImplicitEuler
from grand_fast.testing import assert_close, random_graph

from ._terms import row_stochastic

SCHEMES = {
    "euler": "euler",
    "midpoint": "midpoint",
    "rk4": "rk4",
    "rk4_classic": "rk4_classic",
    "dopri5": "dopri5",
    "bosh3": "bosh3",
    "adaptive_heun": "adaptive_heun",
    "explicit_adams": "explicit_adams",
    "explicit_adams_ramping": ExplicitAdams(max_order=6),
    # The corrections are differentiated as they were run: none is left out for being small
    "implicit_adams": ImplicitAdams(rtol=0.0, atol=0.0),
    "semi_implicit_euler": SemiImplicitEuler(tol=1e-13),
    "semi_implicit_euler_bicgstab": SemiImplicitEuler(tol=1e-13, linear_solver="bicgstab"),
    "semi_implicit_euler_truncated": SemiImplicitEuler(iterations=3),
    "uniformisation": "uniformisation",
}
assert set(SCHEMES) >= set(METHODS)
GRAPH = random_graph("loops", 5)
N, D, HEADS = 5, 2, 2


class Linear(nn.Module):
    """A solve with constant weights; parameters are all that it depends on."""

    def __init__(self):
        super().__init__()
        self.x0 = nn.Parameter(torch.randn(N, D, dtype=torch.float64))
        self.a = nn.Parameter(row_stochastic(GRAPH))
        self.alpha = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.beta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.source = nn.Parameter(torch.randn(N, D, dtype=torch.float64))

    def forward(self, options):
        term = LinearDiffusion(self.a, GRAPH, alpha=self.alpha, beta=self.beta, x0=self.source)
        return gf.integrate(term, self.x0, **options).x


class Nonlinear(nn.Module):
    """A solve with attention from each state."""

    def __init__(self):
        super().__init__()
        self.x0 = nn.Parameter(torch.randn(N, D, dtype=torch.float64))
        self.field = gf.nn.AttentionDiffusion(D, 2 * HEADS, HEADS, source=True).double()
        self.source = nn.Parameter(torch.randn(N, D, dtype=torch.float64))
        nn.init.constant_(self.field.scale.beta, 0.3)

    def forward(self, options):
        term = NonlinearDiffusion(self.field, GRAPH, self.source)
        return gf.integrate(term, self.x0, **options).x


def solve_options(name, adjoint):
    options = {"method": SCHEMES[name], "T": 2.3, "step_size": 0.4, "adjoint": adjoint}
    if name in ADAPTIVE:
        # So loose that each step grows as much as it may, whatever the state: finite differences
        # would else see its length change, which no adjoint differentiates
        options |= {"first_step": 0.02, "rtol": 1e6, "atol": 1e6}
    return options


CASES = [(name, model) for name in SCHEMES for model in (Linear, Nonlinear)
         if not (name == "uniformisation" and model is Nonlinear)]  # fmt: skip


@pytest.mark.parametrize(("name", "model"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_gradcheck(name, model):
    torch.manual_seed(0)
    module = model()
    options = solve_options(name, "direct")
    names, values = zip(*module.named_parameters(), strict=True)
    assert {n.rpartition(".")[2] for n in names} >= {"x0", "beta", "source"}

    def solve(*values):
        return functional_call(module, dict(zip(names, values, strict=True)), (options,))

    assert torch.autograd.gradcheck(solve, values, eps=1e-6, atol=1e-7, rtol=1e-6, fast_mode=True)


@pytest.mark.parametrize(("name", "model"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_checkpoint_equals_direct(name, model):
    torch.manual_seed(0)
    module = model()
    grads = {}
    for adjoint in ("direct", "checkpoint"):
        x = module(solve_options(name, adjoint))
        grads[adjoint] = torch.autograd.grad(x.square().sum(), list(module.parameters()))
    scale = max(float(g.abs().max()) for g in grads["direct"])
    for (leaf, _), got, want in zip(
        module.named_parameters(), grads["checkpoint"], grads["direct"], strict=True
    ):
        if leaf == "field.key.bias":  # cancels in the softmax
            assert float(got.abs().max()) <= 1e-12 * scale
        else:
            assert_close(leaf, got, want, tolerance=1e-12)
