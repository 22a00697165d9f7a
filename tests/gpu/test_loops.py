"""What the gather loops of `attention_diffusion` must not have, and must have, in machine code."""

import pytest
import torch

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from bench.core.problem import Shape
from bench.gpu_report.compile import MODELLED
from bench.gpu_report.launches import passes
from bench.gpu_report.metrics import machine_code
from bench.gpu_report.model import gathered, is_modelled
from bench.gpu_report.sass import load_bytes
from grand_fast.testing import random_graph

from ._cases import CASES

pytestmark = pytest.mark.slow


def _row_bytes(launch, tables):
    """Of one row of each wide table."""
    rows = [launch.arguments[f"{name}_ptr"] for name in tables if name != "norm"]
    return sum(t[0].numel() * t.element_size() for t in rows)


HALF = [(a, s) for a, s, dtype in CASES if a in MODELLED and dtype == torch.float32]


@pytest.mark.parametrize(("arch", "shape"), [*HALF, ("sm_90", Shape(256, 8, 128))], ids=str)
def test_loops_have_no_barrier_and_gather_in_wide_loads(arch, shape):
    """Scores and values share their lanes: what meets in a loop needs no shared memory.

    Rows of float32 whose width 4 divides are read 128 bits a lane, indices, norm and Delta beside.
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
