"""Every GPU kernel, compiled ahead of time for GPUs that are not here, exactly as launched.

The launchers are run with a stand-in that notes their launches, so no list of kernels or arguments
can go out of date.
"""

import os

import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "needs Triton's compiler: unset TRITON_INTERPRET and run pytest tests/gpu/test_compile.py",
        allow_module_level=True,
    )

from bench.gpu_report.compile import TARGETS, compile_launch, record, resources
from grand_fast import Graph
from grand_fast.kernels import _triton
from grand_fast.kernels.attention_diffusion import gpu as attention_diffusion
from grand_fast.kernels.csr_diffusion import gpu as csr_diffusion
from grand_fast.kernels.edge_attention import gpu as edge_attention
from grand_fast.testing import random_edge_index

pytestmark = pytest.mark.slow

SHAPES = ((128, 4, 128), (64, 8, 128), (80, 8, 128), (162, 2, 32), (256, 4, 128))  # d, H, d_att
# A kernel takes 0.2 s or so: the half types, which differ by one conversion, share the shapes.
CASES = [
    *((shape, torch.float32) for shape in SHAPES),
    *((SHAPES[i], torch.bfloat16) for i in (0, 1, 3)),
    *((SHAPES[i], torch.float16) for i in (0, 4)),
]
IDS = [f"{'-'.join(map(str, shape))}-{str(dtype)[6:]}" for shape, dtype in CASES]
KERNELS = 14


def _launches(shape, dtype, n=17, index=torch.int32):
    """Every kernel launch of all operators, forward and backward, on a graph with hubs."""
    d, h, d_att = shape
    edge_index, n = random_edge_index("hub", n)
    graph = Graph.from_edge_index(edge_index, n)
    views = []
    for transposed in (False, True):
        view = graph.csr(transposed=transposed)
        rowptr, col = view.rowptr.to(index), view.col.to(index)
        slot = None if view.slot is None else view.slot.to(index)
        views.append(view._replace(rowptr=rowptr, col=col, slot=slot, work=_triton.cut(rowptr)))
    csr, csr_t = views
    x = torch.zeros(n, d, dtype=dtype)
    q, k = torch.zeros(n, 2, h, d_att // h, dtype=dtype).unbind(1)
    a, da = (torch.zeros(graph.num_edges, *heads, dtype=dtype) for heads in ((), (h,)))
    alpha, lse = torch.ones(d), torch.zeros(n, h)
    with record() as launches:
        for beta, x0 in ((alpha, x), (None, None)):
            add = [(2.0, x), (0.5, x)] if x0 is not None else []
            source = {"alpha": alpha, "beta": beta, "x0": x0, "add": add, "csr": csr}
            csr_diffusion.csr_diffusion_fwd(x, a, **source)
            attention_diffusion.attention_diffusion_fwd(x, q, k, **source)
        views = {"csr": csr, "csr_t": csr_t}
        field = {"alpha": alpha, "df_scale": 0.5, **views}
        for flag in (False, True):
            csr_diffusion.csr_diffusion_bwd(
                x, x, a, **field, needs_dx=True, needs_da=flag, needs_dalpha=not flag
            )
            edge_attention.edge_attention_fwd(q, k, mean_heads=flag, csr=csr)
            edge_attention.edge_attention_bwd(a if flag else da, q, k, lse=lse, **views)
            attention_diffusion.attention_diffusion_bwd(
                x, x, q, k=k, lse=lse, **field, needs_dqk=flag, needs_dalpha=not flag
            )
    return launches


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_compiles_without_spills_or_float_atomics(shape, dtype, arch):
    launches = _launches(shape, dtype)
    assert len({launch.name for launch in launches}) == KERNELS
    seen = set()
    for launch in launches:
        compiled = compile_launch(launch, arch)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        used = resources(compiled)
        assert used.stack == 0, f"{launch.name} spills registers: {used}"
        assert used.float_atomics == 0, f"{launch.name} is not repeatable: {used}"
        tables = [launch.kwargs.get(f"stride_{t}_n", 0) for t in ("x", "q", "k", "df")]
        if any(tables) and all(s * dtype.itemsize % 16 == 0 for s in tables):
            assert used.wide_loads > 0, f"{launch.name} gathers in narrow loads: {used}"


@pytest.mark.parametrize("arch", TARGETS)
def test_no_barrier_where_one_warp_spans_a_row(arch):
    """Scores and values of one width share one layout: nothing goes through shared memory.

    Except where a forward needs the weights of all heads in every lane, for one sweep.
    """
    launches = [*_launches((128, 4, 128), torch.float32), *_launches((64, 8, 128), torch.float32)]
    names = set()
    for launch in launches:
        one_sweep = launch.kwargs.get("IS_ONE_SWEEP", False)
        if launch.name.startswith("_attention_diffusion"):
            used = resources(compile_launch(launch, arch))
            assert one_sweep or (used.barriers == 0 and used.shared == 0), f"{launch.name}: {used}"
            names.add((launch.name, one_sweep))
    assert len(names) == 4, "both forms of the forward, and two of backward"


def test_no_recompilation_for_another_graph():
    """One more node, or other hubs: the same machine code."""
    first, second = (_launches(SHAPES[0], torch.float32, n=n) for n in (16, 17))
    for one, other in zip(first, second, strict=True):
        assert compile_launch(one, "sm_90") is compile_launch(other, "sm_90"), one.name


def test_long_indices():
    for launch in _launches(SHAPES[0], torch.float32, index=torch.int64):
        assert resources(compile_launch(launch, "sm_90")).stack == 0, launch.name


@triton.jit
def _wasteful_kernel(y_ptr, x_ptr, N: tl.constexpr):
    """Holds N · N elements at a time, and adds atomically."""
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs[:, None] * N + offs)
    total = tl.sum(tl.sum(x, 0), 0)
    tl.atomic_add(y_ptr + offs, tl.sum(tl.exp(x - total), 0))


def test_the_gates_can_fail():
    with record() as launches:
        _wasteful_kernel[(1,)](torch.zeros(128), torch.zeros(128, 128), N=128, num_warps=1)
    used = resources(compile_launch(launches[0], "sm_80"))
    assert used.stack > 0 and used.float_atomics > 0
