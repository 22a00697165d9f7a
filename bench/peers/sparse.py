"""The graph in the forms that the peers take it, and sparse products of torch.

Backward is written by hand: torch's own, by the values of a CSR tensor, is dense, [N, N].
"""

import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function as AutogradFunction

from bench.core.problem import Competitor, Function, Problem
from grand_fast import Graph

Product = Callable[[Tensor, Tensor], Tensor]
COLUMN_BLOCKS = (32, 64, 256)


class GraphArrays:
    """Made once per graph and not timed. Edge `e` is slot `e` of the CSR of `A` throughout."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.n, self.e = graph.num_nodes, graph.num_edges

    @cached_property
    def receiver(self) -> Tensor:
        """[E], int64, ascending."""
        nodes = torch.arange(self.n, device=self.graph.device)
        return torch.repeat_interleave(nodes, self.graph.rowptr.diff(), output_size=self.e)

    @cached_property
    def sender(self) -> Tensor:
        """[E], int64."""
        return self.graph.col.long()

    @cached_property
    def rowptr(self) -> Tensor:
        """[N+1], int64."""
        return self.graph.rowptr.long()

    def matrix(self, a: Tensor) -> Tensor:
        """`A` with values `a [E]`, as torch.sparse CSR with the graph's own (int32) indices."""
        return _csr(self.graph.rowptr, self.graph.col, a, self.n)

    def transposed(self, a: Tensor) -> Tensor:
        """`Aᵀ` with values `a [E]`, likewise."""
        graph = self.graph
        return _csr(graph.rowptr_t, graph.col_t, a.index_select(0, graph.perm_t), self.n)


def _csr(rowptr: Tensor, col: Tensor, values: Tensor, n: int) -> Tensor:
    return torch.sparse_csr_tensor(rowptr, col, values, (n, n), check_invariants=False)


def mkl(block: int) -> Product:
    """`A @ x` by MKL, `block` columns at a time: narrow blocks of `x` stay in cache."""

    def product(matrix: Tensor, x: Tensor) -> Tensor:
        if x.shape[1] <= block:
            return matrix @ x
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], block):
            columns = slice(start, start + block)
            out[:, columns] = matrix @ x[:, columns].contiguous()
        return out

    return product


def native(matrix: Tensor, x: Tensor) -> Tensor:
    """`A @ x` by torch's own kernel."""
    return torch.sparse.mm(matrix, x, "sum")


def sparse_products(
    make: Callable[[Problem, Product], Function],
) -> tuple[Competitor, Competitor]:
    """What `make` makes of each product of torch with a whole table."""
    return (
        Competitor("torch.sparse (MKL)", lambda p: make(p, mkl(p.shape.channels))),
        Competitor("torch.sparse.mm(reduce)", lambda p: make(p, native)),
    )


def fastest_product(arrays: GraphArrays, width: int) -> Product:
    """The fastest of all these on this graph and machine, for `width` columns."""
    device = arrays.graph.device
    if device.type == "cuda":
        return mkl(width)  # there it is cuSPARSE, whole: what torch has
    candidates = [native, *(mkl(block) for block in COLUMN_BLOCKS if block < width), mkl(width)]
    matrix, x = arrays.matrix(torch.rand(arrays.e)), torch.randn(arrays.n, width)
    best: dict[Product, float] = {}
    for _ in range(3):
        for product in candidates:
            start = time.perf_counter()
            product(matrix, x)
            seconds = time.perf_counter() - start
            best[product] = min(best.get(product, math.inf), seconds)
    return min(best, key=lambda product: best[product])


def csr_product(x: Tensor, a: Tensor, arrays: GraphArrays, product: Product) -> Tensor:
    """`A(a) x`, differentiable by `x` and `a`."""
    y: Tensor = _CsrProduct.apply(x, a, arrays, product)
    return y


def row_dots(arrays: GraphArrays, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """`scale · <left_i, right_j>` for each edge, [E]."""
    pattern = arrays.matrix(left.new_zeros(arrays.e))
    dots = torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0, alpha=scale)
    return dots.values().clone()  # torch.compile does not take a view of a sparse tensor


class _CsrProduct(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, arrays: GraphArrays, product: Product) -> Tensor:
        ctx.save_for_backward(x, a)
        ctx.arrays, ctx.product = arrays, product
        return product(arrays.matrix(a), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        arrays: GraphArrays = ctx.arrays
        dx = ctx.product(arrays.transposed(a), dy) if ctx.needs_input_grad[0] else None
        da = row_dots(arrays, dy, x) if ctx.needs_input_grad[1] else None
        return dx, da, None, None
