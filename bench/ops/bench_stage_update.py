"""stage_update of a fourth-order stage: four states, and the gradient by each."""

from collections.abc import Sequence

import torch
from torch import Tensor

import grand_fast as gf
from bench.core.problem import OURS, Competitor, Function, Problem, Shape
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.stage_update.reference import cost, stage_update_fwd

SCALES = (1.0, 0.125, 0.375, -0.5)


def setup(graph: gf.Graph, shape: Shape, *, seed: int = 0, element_bytes: int = 4) -> Problem:
    n, d = graph.num_nodes, shape.channels
    g = torch.Generator().manual_seed(seed)

    def reference(csr: Csr, core: Sequence[Tensor]) -> Tensor:
        return stage_update_fwd(core, SCALES)

    return Problem(
        op="stage_update",
        graph=graph,
        shape=shape,
        inputs={f"y{s}": torch.randn(n, d, generator=g) for s in range(len(SCALES))},
        d_out=torch.randn(n, d, generator=g),
        cost=cost(elements=n * d, terms=len(SCALES), element_bytes=element_bytes),
        core=lambda *tensors: tensors,
        reference=reference,
        gathers=False,
    )


def ours(problem: Problem) -> Function:
    return lambda *tensors: gf.ops.stage_update(list(zip(SCALES, tensors, strict=True)))


def stacked(problem: Problem) -> Function:
    """torchdiffeq's: the slopes lie side by side in one tensor, which is multiplied and summed."""
    scales = problem.d_out.new_tensor(SCALES)
    return lambda *tensors: torch.sum(torch.stack(tensors, -1) * scales, -1)


def _chain(*tensors: Tensor) -> Tensor:
    """The strongest chain of torch's own passes: no intermediate but the sum."""
    y = tensors[0] * SCALES[0]
    for tensor, scale in zip(tensors[1:], SCALES[1:], strict=True):
        y = y.add(tensor, alpha=scale)
    return y


COMPETITORS = (
    Competitor(OURS, ours),
    Competitor("torch, a pass per term", lambda problem: _chain),
    Competitor("torch.compile", lambda problem: torch.compile(_chain)),
    Competitor("torchdiffeq's form", stacked, slow=True),
)
