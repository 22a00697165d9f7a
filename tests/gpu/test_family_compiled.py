"""Every score, normaliser and direction as compiled code: its resources, and run as PTX.

Sets of kernels that have every switch, not every combination.
"""

import pytest
import torch
from torch.autograd import grad

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from bench.core.problem import Shape
from bench.gpu_report.compile import compile_launch, resources
from bench.gpu_report.launches import family
from grand_fast.kernels.attention_diffusion import gpu as attention_diffusion
from grand_fast.kernels.attention_diffusion import reference as attention_diffusion_reference
from grand_fast.kernels.edge_attention import gpu as edge_attention
from grand_fast.kernels.edge_attention import reference as edge_attention_reference
from grand_fast.kernels.weighting import Weighting
from grand_fast.testing import assert_close, random_graph
from tests.gpu.ptx.emulator import emulated

from ._compiled import cut_views, make_graph, make_inputs, make_scales

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_filled")]

BF16, F32 = torch.bfloat16, torch.float32
TYPES = [  # of the state, and of q and k, which a score may bring in float32
    ("sm_80", F32, F32), ("sm_120", BF16, F32), ("gfx942", F32, F32),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "dtype", "prepared"), TYPES, ids=str)
def test_compiles_without_spills_or_float_atomics(arch, dtype, prepared):
    seen = set()
    for launch in family(random_graph("hub", 17), Shape(128, 4, 128), dtype, prepared=prepared):
        compiled = compile_launch(launch, arch)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            used = resources(compiled)
            assert used.stack == 0, f"{launch.name} spills registers: {used}"
            assert used.float_atomics == 0, f"{launch.name} is not repeatable: {used}"
    assert len(seen) > 20


WEIGHTINGS = [
    Weighting(0.2, "exp", normalizer="squareplus", normalize="sender"),
    Weighting(0.7, "leaky_relu", slope=0.2, normalizer="squareplus"),
    Weighting(0.4, "identity", normalize="sender"),
]


def name_of(value):
    if not isinstance(value, Weighting):
        return str(value)
    return f"{value.function}-{value.normalizer}-{value.normalize}"


def _attention(weighting, graph, shape, dtype):
    """q, k and what weights depend on beside them."""
    t = make_inputs(shape, dtype, graph)
    edge_weight = torch.randn(graph.num_edges).to(dtype)
    q, k = t["q"], t["k"]
    with emulated("sm_80"):
        top_of_row = edge_attention.edge_attention_top(
            q, k, weighting=weighting, edge_weight=edge_weight, csr=cut_views(graph)[0]
        )
    wide = [v.double() for v in (q, k)]
    want = edge_attention_reference.edge_attention_top(
        *wide, weighting=weighting, edge_weight=edge_weight.double(), csr=graph.csr()
    )
    assert_close("top", top_of_row, want)
    return t, {"weighting": weighting, "edge_weight": edge_weight, "top": top_of_row.max()}


def _leaves(**tensors):
    return {name: t.double().requires_grad_() for name, t in tensors.items()}


# By turns in either type, and one weight a head or their mean
@pytest.mark.parametrize(("weighting", "arch", "dtype"), [
    (WEIGHTINGS[0], "sm_80", F32), (WEIGHTINGS[1], "sm_90", BF16), (WEIGHTINGS[2], "sm_80", F32),
    (WEIGHTINGS[0], "sm_90", BF16),
], ids=name_of)  # fmt: skip
def test_attention_diffusion(weighting, arch, dtype):
    graph, shape = make_graph(), (16, 4, 32)
    csr, csr_t = cut_views(graph)
    t, of = _attention(weighting, graph, shape, dtype)
    x, q, k, df, alpha = t["x"], t["q"], t["k"], t["df"], make_scales(shape[0])["alpha"]
    with emulated(arch):
        f, norm = attention_diffusion.attention_diffusion_fwd(
            x, q, k, **of, alpha=alpha, beta=None, x0=None, csr=csr, csr_t=csr_t
        )
        got = attention_diffusion.attention_diffusion_bwd(
            df, x, q, k=k, norm=norm, **of, alpha=alpha, csr=csr, csr_t=csr_t, needs_dqk=True,
            needs_dalpha=False, needs_dedge_weight=True,
        )  # fmt: skip
    leaves = _leaves(x=x, q=q, k=k, edge_weight=of["edge_weight"], top=of["top"])
    want_f, want_norm = attention_diffusion_reference.attention_diffusion_fwd(
        **leaves, weighting=weighting, alpha=alpha.double(), beta=None, x0=None, csr=graph.csr()
    )
    assert_close("f", f, want_f)
    assert_close("norm", norm, want_norm)
    _check_gradients(got, leaves, want_f, df)


@pytest.mark.parametrize(
    ("weighting", "mean_heads"),
    [*zip(WEIGHTINGS, (False, True, False), strict=True), (WEIGHTINGS[0], True)],
    ids=name_of,
)
def test_edge_attention(weighting, mean_heads):
    graph, shape = make_graph(), (1, 4, 32)
    csr, csr_t = cut_views(graph)
    t, of = _attention(weighting, graph, shape, F32)
    q, k = t["q"], t["k"]
    with emulated("sm_80"):
        a, norm = edge_attention.edge_attention_fwd(
            q, k, **of, mean_heads=mean_heads, csr=csr, csr_t=csr_t
        )
        da = torch.randn(a.shape)
        got = edge_attention.edge_attention_bwd(
            da, q, k, norm=norm, **of, csr=csr, csr_t=csr_t, needs_dedge_weight=True
        )
    leaves = _leaves(q=q, k=k, edge_weight=of["edge_weight"], top=of["top"])
    want, _ = edge_attention_reference.edge_attention_fwd(
        **leaves, weighting=weighting, mean_heads=mean_heads, csr=graph.csr()
    )
    assert_close("a", a, want)
    _check_gradients(got, leaves, want, da)


def _check_gradients(got, leaves, out, upstream):
    """Each by an input, and by the largest score as if it were one, where it is."""
    wanted = {n: leaf for n, leaf in leaves.items() if n != "top" or got.dtop is not None}
    grads = grad(out, list(wanted.values()), upstream.double())
    for name, want in zip(wanted, grads, strict=True):
        # what is left of the sum of all ds, which cancel
        tolerance = 1e-3 if name == "top" else None
        assert_close(f"d{name}", getattr(got, f"d{name}"), want, tolerance=tolerance)
