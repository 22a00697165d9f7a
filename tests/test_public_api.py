"""`__all__` is exactly the documented surface."""

import inspect

import pytest

import grand_fast as gf

SURFACE = {
    gf: {"Graph", "Solution", "Stats", "Status", "__version__", "backend", "diffusion_rewiring",
         "integrate", "nn", "odeint", "odeint_adjoint", "ops"},
    gf.ops: {"ExpKernel", "GAT", "attention_diffusion", "csr_diffusion", "edge_attention",
             "error_ratio", "projected_attention_diffusion", "stage_update"},
    gf.nn: {"GRAND", "AttentionDiffusion", "GRANDConv"},
}  # fmt: skip


@pytest.mark.parametrize("module", SURFACE, ids=lambda m: m.__name__)
def test_surface(module):
    assert set(module.__all__) == SURFACE[module]
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("function", [
    gf.ops.attention_diffusion, gf.ops.csr_diffusion, gf.ops.edge_attention,
    gf.ops.projected_attention_diffusion, gf.ops.stage_update, gf.ops.error_ratio, gf.integrate,
    gf.odeint, gf.odeint_adjoint, gf.Graph.from_edge_index, gf.Graph.keep_edges,
    gf.diffusion_rewiring,
])  # fmt: skip
def test_every_argument_is_documented(function):
    documented = function.__doc__
    assert "Args:" in documented and "Returns:" in documented
    for name in inspect.signature(function).parameters:
        assert name in documented, f"{function.__name__}: {name}"
