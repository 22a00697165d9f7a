"""The check before timing: output and every gradient against the reference in float64."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.problem import Function, Problem, gradients
from grand_fast import Graph
from grand_fast.kernels._csr import Csr
from grand_fast.testing import assert_close

# Edges whose float64 intermediates are held at a time: about 2 GB at 256 channels.
BLOCK_EDGES = 300_000


def expected(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients of the reference in float64, by blocks of rows to bound its memory.

    Rows do not share a softmax, so the output is the sum over the blocks, and so is each gradient.
    """
    inputs = [t.double().requires_grad_() for t in problem.inputs.values()]
    core = problem.core(*inputs)
    leaves = [t.detach().requires_grad_() for t in core]
    d_out = problem.d_out.double()
    out = torch.zeros_like(d_out)
    sums = [torch.zeros_like(t) for t in leaves]
    for csr, edges in _row_blocks(problem.graph):
        part = problem.block(csr, edges, leaves)
        where = slice(None) if part.shape == out.shape else edges
        out[where] += part.detach()
        for total, grad in zip(sums, torch.autograd.grad(part, leaves, d_out[where]), strict=True):
            total += grad
    return _named(problem, out, torch.autograd.grad(core, inputs, sums))


def check(name: str, function: Function, problem: Problem, want: dict[str, Tensor]) -> None:
    """Raise AssertionError if the output or a gradient of `function` is not the reference's."""
    for key, got in _named(problem, *gradients(function, problem)).items():
        assert_close(f"{name}: {key}", got, want[key])


def _row_blocks(graph: Graph) -> Iterator[tuple[Csr, slice]]:
    """The CSR of `A` with the edges of some rows only, and which edges these are."""
    rowptr = graph.rowptr.long()
    start = 0
    while True:
        row = int(torch.searchsorted(rowptr, start + BLOCK_EDGES, right=True)) - 1
        stop = int(rowptr[row])
        if stop == start:  # a row longer than a block
            stop = int(rowptr[min(row + 1, graph.num_nodes)])
        edges = slice(start, stop)
        clipped = (rowptr.clamp(start, stop) - start).to(graph.rowptr.dtype)
        yield Csr(rowptr=clipped, col=graph.col[edges], slot=None, work=None), edges
        if stop == graph.num_edges:
            return
        start = stop


def _named(problem: Problem, out: Tensor, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    values = {f"d{name}": grad for name, grad in zip(problem.inputs, grads, strict=True)}
    if "db_k" in values:
        # ∂b_k vanishes under softmax; what is left is rounding, to be judged on the scale of ∂b_q.
        values["db"] = torch.cat([values.pop("db_q"), values.pop("db_k")])
    return {"out": out, **values}
