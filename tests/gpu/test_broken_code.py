"""Compiled kernels, broken on purpose: the emulator's checks or the reference must find it."""

import functools
import re

import pytest
import torch

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from bench.gpu_report.compile import compile_launch, record
from grand_fast.kernels.attention_diffusion import gpu as attention_diffusion
from grand_fast.kernels.edge_attention import gpu as edge_attention
from grand_fast.testing import assert_close
from tests.gpu.ptx.emulator import run
from tests.gpu.ptx.parser import EmulationError

from ._compiled import cut_views, diffusion_in_float64, make_graph, make_inputs, make_scales

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_filled")]


class _Forward:
    """The launches of one forward pass, to be run in part or with other machine code."""

    def __init__(self, shape=(128, 4, 128)):
        graph = make_graph()
        csr, _ = cut_views(graph)
        t, scales = make_inputs(shape, torch.float32, graph), make_scales(shape[0])
        x, q, k, x0 = t["x"], t["q"], t["k"], t["x0"]
        with record() as self.launches:
            self.f, self.norm = attention_diffusion.attention_diffusion_fwd(
                x, q, k, **scales, x0=x0, csr=csr
            )
        self.want = diffusion_in_float64(x, q, k, **scales, x0=x0, graph=graph)

    def run(self, *, only=lambda launch: True, edit=None):
        """`edit` changes the PTX of the main kernel."""
        for launch in filter(only, self.launches):
            is_main = launch is self.main
            run(launch, "sm_80", edit=edit if is_main else None)

    @property
    def main(self):
        """The launch with most programs."""
        return max(self.launches, key=lambda launch: launch.grid[0])

    def check(self):
        assert_close("f", self.f, self.want[0])
        assert_close("norm", self.norm, self.want[1])


def test_unbroken_code_passes():
    forward = _Forward()
    forward.run()
    forward.check()


def test_finds_a_missing_mask():
    def unmask(ptx):
        assert re.search(r"@%p\d+ ld\.global", ptx)
        return re.sub(r"@%p\d+ (ld\.global)", r"\1", ptx)

    with pytest.raises(EmulationError, match="out of bounds"):
        _Forward().run(edit=unmask)


def test_finds_a_missing_join():
    forward = _Forward()
    forward.run(only=lambda launch: "join" not in launch.name)
    with pytest.raises(AssertionError, match="f: error"):
        forward.check()


@pytest.mark.parametrize("opcode", ("sub.f32", "selp.f32"))
def test_finds_swapped_operands(opcode):
    def swap(ptx):
        swapped, count = re.subn(
            rf"({opcode}\s+%r\d+), ([^,]+), ([^,;]+)", r"\1, \3, \2", ptx, count=1
        )
        assert count == 1
        return swapped

    forward = _Forward()
    forward.run(edit=swap)
    with pytest.raises(AssertionError, match="error|infinities"):
        forward.check()


def test_finds_a_misaligned_vector():
    def shift(ptx):
        shifted, count = re.subn(r"(ld\.global\.v4.*?) \+ 0 \]", r"\1 + 4 ]", ptx, count=1)
        assert count == 1
        return shifted

    with pytest.raises(EmulationError, match="misaligned"):
        _Forward().run(edit=shift)


def _without(span, text):
    return text[: span[0]] + text[span[1] :]


@pytest.mark.parametrize("shape", ((5, 1, 1024), (162, 2, 32)), ids=("two warps", "one warp"))
def test_finds_missing_barriers(shape):
    """Lanes meet in shared memory where layouts change, and the warps of a wide row always."""
    graph = make_graph()
    csr, _ = cut_views(graph)
    t = make_inputs(shape, torch.float32, graph)
    with record() as launches:
        edge_attention.edge_attention_fwd(t["q"], t["k"], mean_heads=False, csr=csr)
    removed = 0
    for launch in launches:
        ptx = compile_launch(launch, "sm_80").asm["ptx"]
        run(launch, "sm_80")
        for barrier in re.finditer(r"bar(\.warp)?\.sync\s+-?\d;", ptx):
            with pytest.raises(EmulationError, match="race"):
                run(launch, "sm_80", edit=functools.partial(_without, barrier.span()))
            removed += 1
    assert removed > 3
