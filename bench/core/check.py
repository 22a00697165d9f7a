"""The check before timing: output and every gradient against the reference in float64."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bench.core import machine
from bench.core.harness import threads
from bench.core.problem import (
    Competitor,
    Differentiated,
    Function,
    Problem,
    UnavailableError,
    gradients,
)
from bench.core.report import Report
from grand_fast import Graph
from grand_fast.kernels.csr import Csr
from grand_fast.testing import assert_close

# Edges checked at a time: their float64 intermediates then fit the cache and the allocator's heap.
BLOCK_EDGES = 8_192


@threads(1)  # the blocks are too small for more
def expected(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients of the reference in float64, one block of rows after the other.

    Rows share no softmax, so output and gradients are sums over the blocks. Each block is a graph
    of its own, on the nodes that it touches.
    """
    inputs = [t.double().requires_grad_() for t in problem.inputs.values()]
    core = problem.core(*inputs)
    d_out = problem.d_out.double()
    if not problem.gathers:
        out = problem.reference(problem.graph.csr(), core)
        return named(problem, out.detach(), torch.autograd.grad(out, inputs, d_out))
    subtracts = problem.is_field and not problem.edge_output
    out = torch.zeros_like(d_out)
    sums = [torch.zeros_like(t) for t in core]
    for csr, nodes, edges in _row_blocks(problem.graph):
        where = [edges if t.dim() == 1 else nodes for t in core]
        block = [t.detach()[w].requires_grad_() for t, w in zip(core, where, strict=True)]
        part = problem.reference(csr, block)
        rows = edges if problem.edge_output else nodes
        if subtracts:
            part = part + block[0]  # leaves A x: −x is due once for all blocks
        out[rows] += part.detach()
        grads = torch.autograd.grad(part, block, d_out[rows])
        for total, grad, w in zip(sums, grads, where, strict=True):
            total[w] += grad
    if subtracts:
        out -= core[0].detach()
        sums[0] -= d_out
    return named(problem, out, torch.autograd.grad(core, inputs, sums))


def check(
    name: str,
    function: Function,
    problem: Differentiated,
    want: Mapping[str, Tensor],
    tolerance: Mapping[str, float] | None = None,
) -> None:
    """Raise AssertionError if the output or a gradient of `function` is not the reference's.

    `tolerance` is for what it names; for the rest that of the dtype.
    """
    compare(name, named(problem, *gradients(function, problem)), want, tolerance)


def compare(
    name: str,
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    tolerance: Mapping[str, float] | None = None,
) -> None:
    """`check` of what a function gave."""
    for key, value in got.items():
        assert_close(f"{name}: {key}", value, want[key], tolerance=(tolerance or {}).get(key))


def right(
    makes: Mapping[str, Callable[[], Function]],
    problem: Differentiated,
    want: Mapping[str, Tensor],
    case: str,
    report: Report,
    tolerance: Mapping[str, float],
) -> dict[str, Function]:
    """The functions made whose results are those wanted, by name; the report names the others."""
    found = {}
    for name, make in makes.items():
        report.say(f"{case}: {name}, check")
        try:
            function = make()
            check(name, function, problem, want, tolerance)
            found[name] = function
        except AssertionError as difference:
            report.failed.append(f"{case}: {difference}")
    return found


def agreeing(
    problem: Problem, competitors: Sequence[Competitor], case: str, report: Report
) -> dict[str, tuple[Function, float]]:
    """The competitors that fit into memory and agree with the reference, by name.

    With each the seconds of its first forward+backward. The others are named in the report.
    """
    report.say(f"{case}: reference")
    want, found = expected(problem), {}
    for competitor in competitors:
        name = f"{case}: {competitor.name}"
        report.say(f"{name}: check")
        try:
            machine.require_memory(name, competitor.bytes_needed(problem))
            function = competitor.make(problem)
            start = time.perf_counter()
            result = gradients(function, problem)
            first_call = time.perf_counter() - start
            if competitor.exact:
                compare(competitor.name, named(problem, *result), want)
            found[competitor.name] = function, first_call
        except (UnavailableError, machine.DoesNotFitError) as reason:
            report.skipped.append(f"{name}: {reason}")
        except AssertionError as difference:
            report.failed.append(f"{case}: {difference}")
    return found


def _row_blocks(graph: Graph) -> Iterator[tuple[Csr, Tensor, slice]]:
    """Some consecutive rows of `A` as a small CSR, the nodes it is on, and the edges of these."""
    rowptr = graph.rowptr.long()
    first = 0
    while first < graph.num_nodes:
        limit = int(rowptr[first]) + BLOCK_EDGES
        last = int(torch.searchsorted(rowptr, limit, right=True)) - 1
        last = min(max(last, first + 1), graph.num_nodes)
        edges = slice(int(rowptr[first]), int(rowptr[last]))
        rows = torch.arange(first, last)
        nodes, local = torch.unique(torch.cat([rows, graph.col[edges].long()]), return_inverse=True)
        degree = torch.zeros(len(nodes), dtype=torch.int64)
        degree[local[: len(rows)]] = rowptr[first : last + 1].diff()
        small = torch.zeros(len(nodes) + 1, dtype=torch.int64)
        torch.cumsum(degree, 0, out=small[1:])
        yield Csr(rowptr=small, col=local[len(rows) :], slot=None, work=None), nodes, edges
        first = last


def named(problem: Differentiated, out: Tensor, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """Output and gradients by name, those of both biases as one."""
    values = {f"d{name}": grad for name, grad in zip(problem.inputs, grads, strict=True)}
    if "db_k" in values:
        # ∂b_k vanishes under softmax; what is left is rounding, to be judged on the scale of ∂b_q.
        values["db"] = torch.cat([values.pop("db_q"), values.pop("db_k")])
    return {"out": out, **values}
