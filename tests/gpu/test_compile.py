"""Every GPU kernel, compiled ahead of time for GPUs that are not here, exactly as launched.

The launchers are run with a stand-in that notes their launches, so no list of kernels or arguments
can go out of date.
"""

import os
import sys
from functools import cache

import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "needs Triton's compiler: unset TRITON_INTERPRET and run pytest tests/gpu/test_compile.py",
        allow_module_level=True,
    )

from bench.gpu_report.compile import MODELLED, TARGETS, compile_launch, record, resources
from bench.gpu_report.launches import every_launch, passes
from bench.gpu_report.metrics import machine_code
from bench.gpu_report.model import gathered, is_modelled
from bench.gpu_report.sass import load_bytes
from bench.problem import Shape
from grand_fast.kernels.attention_diffusion._triton_backward import LANE_COLUMNS
from grand_fast.testing import random_graph

pytestmark = pytest.mark.slow

SHAPES = [Shape(128, 4, 128), Shape(64, 8, 128), Shape(80, 8, 128), Shape(162, 2, 32),
          Shape(256, 4, 128), Shape(64, 1, 64)]  # fmt: skip
CASES = [
    *((arch, shape, dtype) for arch in TARGETS for shape in SHAPES
      for dtype in (torch.float32, torch.bfloat16)),
    # differs from bfloat16 by one conversion
    *(("sm_90", SHAPES[i], torch.float16) for i in (0, 4)),
]  # fmt: skip
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


@cache
def _launches(shape, dtype, n=17, index=torch.int32):
    """Of a graph with hubs, so that rows are split."""
    return every_launch(random_graph("hub", n), shape, dtype, index=index)


@pytest.mark.parametrize(("arch", "shape", "dtype"), CASES, ids=IDS)
def test_compiles_without_spills_or_float_atomics(arch, shape, dtype):
    launches = [launch for n in SIZES for launch in _launches(shape, dtype, n)]
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
        tables = [launch.kwargs.get(f"stride_{t}_n", 0) for t in ("x", "q", "k", "df")]
        reads = LANE_COLUMNS if launch.name.startswith("_attention_diffusion") else 16
        # The sizes are for 32 lanes: AMD's 64 share some rows 8 bytes each, still 512 a load.
        is_wide = min(reads * dtype.itemsize, 16) == 16 and TARGETS[arch].warp_size == 32
        if is_wide and any(tables) and all(s * dtype.itemsize % 16 == 0 for s in tables):
            assert used.wide_loads > 0, f"{launch.name} gathers in narrow loads: {used}"


def _row_bytes(launch, tables):
    """Of one row of each wide table."""
    rows = [launch.arguments[f"{name}_ptr"] for name in tables if name != "lse"]
    return sum(t[0].numel() * t.element_size() for t in rows)


@pytest.mark.parametrize("arch", MODELLED)
@pytest.mark.parametrize("shape", [*SHAPES, Shape(256, 8, 128)], ids=str)
def test_loops_have_no_barrier_and_gather_in_wide_loads(arch, shape):
    """Scores and values share their lanes: what meets in a loop needs no shared memory.

    Rows of float32 whose width 4 divides are read 128 bits a lane, indices, lse and Delta beside.
    """
    forms = set()
    by_pass = passes(random_graph("hub", 17), shape, torch.float32)
    for name in ("attention_diffusion forward", "attention_diffusion backward"):
        for launch in by_pass[name]:
            kernel = machine_code(launch, arch)
            assert kernel.metrics.barriers == 0, launch.name
            if is_modelled(kernel) and shape.channels % 4 == 0:
                for loop, tables in zip(kernel.loops, gathered(launch), strict=True):
                    wide = load_bytes(loop, at_least=16) * kernel.used.warps / launch.slots
                    assert wide >= 0.9 * _row_bytes(launch, tables), launch.name
            forms.add((launch.name, launch.kwargs.get("IS_ONE_SWEEP")))
    assert ("_attention_diffusion_fwd_kernel", shape != Shape(256, 8, 128)) in forms


def test_no_recompilation_for_another_graph():
    """One more node, or other hubs: the same machine code."""
    first, second = (_launches(SHAPES[0], torch.float32, n) for n in SIZES)
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
