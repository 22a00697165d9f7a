"""Every GPU kernel, compiled ahead of time for GPUs that are not here, exactly as launched.

The launchers are run with a stand-in that notes their launches, so no list of kernels or arguments
can go out of date.
"""

import sys
from functools import cache

import pytest
import torch
import triton
import triton.language as tl

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from bench.core.problem import PAPER_SHAPES
from bench.gpu_report.compile import TARGETS, compile_launch, record, resources
from bench.gpu_report.launches import every_launch, passes
from grand_fast.kernels.gpu.sizes import LANE_COLUMNS
from grand_fast.testing import random_graph

from ._cases import CASES

pytestmark = pytest.mark.slow

IDS = [f"{arch}-{shape}-{str(dtype)[6:]}" for arch, shape, dtype in CASES]
SIZES = (16, 17)  # Triton compiles apart for sizes that 16 divides, where it is told to
# Every kernel of the modules that the launchers have imported
KERNELS = {
    value.__name__
    for path, module in list(sys.modules.items())
    if path.startswith("grand_fast.kernels.")
    for name, value in vars(module).items()
    if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
}


# Of each GPU the first, with every switch of the launchers; of the others what `passes` launches
SWITCHED = [next(case for case in CASES if case[0] == arch) for arch in TARGETS]


@cache
def _launches(shape, dtype, n, *, switched=True):
    """Of a graph with hubs, so that rows are split."""
    graph = random_graph("hub", n)
    if switched:
        return every_launch(graph, shape, dtype)
    return [launch for some in passes(graph, shape, dtype).values() for launch in some]


@pytest.mark.parametrize(("arch", "shape", "dtype"), CASES, ids=IDS)
def test_compiles_without_spills_or_float_atomics(arch, shape, dtype):
    switched = (arch, shape, dtype) in SWITCHED
    launches = [x for n in SIZES for x in _launches(shape, dtype, n, switched=switched)]
    if switched:
        assert {launch.name for launch in launches} == KERNELS
    seen = set()
    for launch in launches:
        compiled = compile_launch(launch, arch)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        used = resources(compiled)
        assert used.stack == 0, f"{launch.name} spills registers: {used}"
        assert used.float_atomics == 0, f"{launch.name} is not repeatable: {used}"
        tables = [launch.arguments.get(f"stride_{t}_n", 0) for t in ("x", "q", "k", "df")]
        # The pass that finds norm has the tiles of the forward that uses it.
        is_forward = launch.name == "_edge_attention_fwd_norm_kernel"
        gathers_both = launch.name.startswith(("_attention_diffusion", "_attention_product"))
        gathers_both |= is_forward or launch.arguments.get("x_sizes") is not None
        if is_forward and shape.channels % LANE_COLUMNS:
            continue  # whose rows of x may begin anywhere
        reads = LANE_COLUMNS if gathers_both else 16
        # The sizes are for 32 lanes: AMD's 64 share some rows 8 bytes each, still 512 a load.
        is_wide = min(reads * dtype.itemsize, 16) == 16 and TARGETS[arch].warp_size == 32
        if is_wide and any(tables) and all(s * dtype.itemsize % 16 == 0 for s in tables):
            assert used.wide_loads > 0, f"{launch.name} gathers in narrow loads: {used}"


def test_no_recompilation_for_another_graph():
    """One more node, or other hubs: the same machine code."""
    first, second = (_launches(PAPER_SHAPES[0], torch.float32, n) for n in SIZES)
    for one, other in zip(first, second, strict=True):
        assert compile_launch(one, "sm_90") is compile_launch(other, "sm_90"), one.name


def test_long_indices():
    graph = random_graph("hub", SIZES[1])
    for some in passes(graph, PAPER_SHAPES[0], torch.float32, index=torch.int64).values():
        for launch in some:
            assert resources(compile_launch(launch, "sm_90")).stack == 0, launch.name


@triton.jit
def _wasteful_kernel(y_ptr, x_ptr, N: tl.constexpr):
    """Holds N · N elements at a time, and adds atomically."""
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs[:, None] * N + offs)
    total = tl.sum(tl.sum(x, 0), 0)
    tl.atomic_add(y_ptr + offs, tl.sum(tl.exp(x - total), 0))


@pytest.mark.parametrize(
    ("arch", "size", "options"),
    [("sm_80", 128, {}), ("gfx942", 64, {"waves_per_eu": 8})],  # eight leave 64 registers to each
    ids=["sm_80", "gfx942"],
)
def test_the_gates_can_fail(arch, size, options):
    x = torch.zeros(size, size)
    with record() as launches:
        _wasteful_kernel[(1,)](torch.zeros(size), x, N=size, num_warps=1, **options)
    used = resources(compile_launch(launches[0], arch))
    assert used.stack > 0 and used.float_atomics > 0
