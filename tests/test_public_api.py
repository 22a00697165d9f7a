"""`__all__` is exactly the documented surface."""

import inspect
import re

import pytest

import grand_fast as gf

SURFACE = {
    gf: {"Graph", "Solution", "Solve", "Stats", "Status", "__version__", "backend", "compat",
         "diffusion_rewiring", "graph_of", "integrate", "nn", "odeint", "odeint_adjoint",
         "odeint_dense", "odeint_event", "ops", "terms"},
    gf.ops: {"ExpKernel", "GAT", "attention_diffusion", "attention_product",
             "csr_diffusion", "edge_attention", "edge_softmax", "error_ratio",
             "projected_attention_diffusion", "spmm", "stage_update"},
    gf.compat: {"Patch", "Report", "accelerate", "patch", "stand_ins"},
    gf.nn: {"GRAND", "Attention", "AttentionDiffusion", "GATConv", "GRANDConv", "TransformerConv"},
    gf.terms: {"Combination", "LinearTerm", "Term", "attention", "blurring_sharpening", "graphcon",
               "linear", "reaction", "source"},
}  # fmt: skip


@pytest.mark.parametrize("module", SURFACE, ids=lambda m: m.__name__)
def test_surface(module):
    assert set(module.__all__) == SURFACE[module]
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, f"{name} has no docstring"


def documented(function):
    """The names before the colons of `Args:`, where one entry may name several."""
    section = re.search(r"^Args:\n(.*?)(\n\n|\Z)", inspect.getdoc(function), re.M | re.S)
    entries = re.split(r"^ {4}(?=\S)", section[1], flags=re.M)[1:]
    return [name for e in entries for name in re.split(r",\s+", e.partition(":")[0])]


FUNCTIONS = [
    gf.ops.attention_diffusion, gf.ops.csr_diffusion, gf.ops.edge_attention,
    gf.ops.projected_attention_diffusion, gf.ops.stage_update, gf.ops.error_ratio, gf.integrate,
    gf.ops.spmm, gf.ops.edge_softmax, gf.odeint, gf.odeint_adjoint, gf.odeint_dense,
    gf.odeint_event, gf.Graph.from_edge_index,
    gf.Graph.keep_edges, gf.Graph.reorder, gf.diffusion_rewiring, gf.graph_of,
    gf.compat.accelerate, gf.compat.patch, gf.terms.linear, gf.terms.attention,
    gf.terms.blurring_sharpening, gf.terms.source, gf.terms.reaction, gf.terms.graphcon,
]  # fmt: skip
OTHERS = [
    gf.backend, gf.ops.ExpKernel, gf.ops.GAT, gf.nn.GRAND, gf.nn.GRAND.trajectory, gf.nn.GRANDConv,
    gf.nn.GRANDConv.forward, gf.nn.Attention, gf.nn.AttentionDiffusion, gf.Solve,
    gf.nn.GATConv, gf.nn.GATConv.forward, gf.nn.TransformerConv, gf.nn.TransformerConv.forward,
]  # fmt: skip


@pytest.mark.parametrize("function", [*FUNCTIONS, *OTHERS], ids=lambda f: f.__qualname__)
def test_every_argument_is_documented(function):
    parameters = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        # What takes positional arguments only to refuse them is no argument.
        if name != "self" and parameter.kind is not parameter.VAR_POSITIONAL
    ]
    assert sorted(documented(function)) == sorted(parameters)
    assert function in OTHERS or re.search(r"^Returns:$", inspect.getdoc(function), re.M)


def test_a_name_in_the_prose_is_no_documentation():
    def function(x, a, T, rtol, atol, method):
        """f of x and a, up to T by a method.

        Args:
            x: state, of a to T.
            rtol, atol,
                method: as in x, T: those of a
                method.

        a: not here.
        """

    assert documented(function) == ["x", "rtol", "atol", "method"]
