"""error_ratio of a Dormand–Prince step: six slopes, and the states before and after."""

from collections.abc import Sequence

import torch
from torch import Tensor

import grand_fast as gf
from bench.core.problem import OURS, Competitor, Function, Problem, Shape
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.error_ratio.reference import cost, error_ratio_fwd

SCALES = (0.0012, -0.0042, 0.034, -0.05, 0.026, -0.025)
RTOL, ATOL = 1e-3, 1e-4


def setup(graph: gf.Graph, shape: Shape, *, seed: int = 0, element_bytes: int = 4) -> Problem:
    n, d = graph.num_nodes, shape.channels
    g = torch.Generator().manual_seed(seed)
    names = [f"f{s}" for s in range(len(SCALES))] + ["x", "y"]

    def reference(csr: Csr, core: Sequence[Tensor]) -> Tensor:
        *slopes, x, y = core
        return error_ratio_fwd(slopes, SCALES, x, y, rtol=RTOL, atol=ATOL)

    return Problem(
        op="error_ratio",
        graph=graph,
        shape=shape,
        inputs={name: torch.randn(n, d, generator=g) for name in names},
        d_out=torch.ones(()),
        cost=cost(elements=n * d, terms=len(SCALES), element_bytes=element_bytes),
        core=lambda *tensors: tensors,
        reference=reference,
        gathers=False,
    )


def ours(problem: Problem) -> Function:
    def call(*tensors: Tensor) -> Tensor:
        *slopes, x, y = tensors
        terms = list(zip(SCALES, slopes, strict=True))
        return gf.ops.error_ratio(terms, x, y, rtol=RTOL, atol=ATOL)

    return call


def _ratio(*tensors: Tensor) -> Tensor:
    *slopes, x, y = tensors
    error = slopes[0] * SCALES[0]
    for slope, scale in zip(slopes[1:], SCALES[1:], strict=True):
        error = error.add(slope, alpha=scale)
    return (error / (ATOL + RTOL * torch.maximum(x.abs(), y.abs()))).square().mean().sqrt()


COMPETITORS = (
    Competitor(OURS, ours),
    Competitor("torch, a pass per term", lambda problem: _ratio),
    Competitor("torch.compile", lambda problem: torch.compile(_ratio)),
)
