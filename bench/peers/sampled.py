"""The strongest form of GRAND's attention that torch alone allows, with a backward by hand.

Scores by `torch.sparse.sampled_addmm` head by head, softmax by `segment_reduce`, products by the
fastest that torch has for each width on this machine, elementwise parts by torch.compile. Nothing
of size E·d is ever written; backward keeps the weights of all heads, [E, H], instead of
recomputing them.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function as AutogradFunction

from bench.core.problem import Function, Problem
from bench.peers.sparse import GraphArrays, fastest_product, row_dots
from bench.peers.unfused import has_compiler


def sampled_attention_diffusion(problem: Problem) -> Function:
    """`attention_diffusion` with its projections."""
    parts = _Parts(problem)

    def function(x: Tensor, w_q: Tensor, b_q: Tensor, w_k: Tensor, b_k: Tensor) -> Tensor:
        weight, bias = torch.cat([w_q, w_k]), torch.cat([b_q, b_k])
        return _AttentionDiffusion.apply(x, weight, bias, parts)

    return function


def sampled_edge_attention(problem: Problem) -> Function:
    """`edge_attention`."""
    parts = _Parts(problem)
    return lambda q, k: _EdgeAttention.apply(q, k, parts)


class _Parts:
    """What depends on the graph and the shape alone."""

    def __init__(self, problem: Problem) -> None:
        self.arrays, self.shape = GraphArrays(problem.graph), problem.shape
        self.heads, self.scale = problem.shape.heads, problem.shape.d_k**-0.5
        self.product = fastest_product(self.arrays, problem.shape.channels)
        self.head_product = fastest_product(self.arrays, problem.shape.d_k)

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """Each row's maximum or sum, [N]."""
        offsets = self.arrays.rowptr
        return torch.segment_reduce(values, how, offsets=offsets, axis=0, unsafe=True)

    def weights(self, q: Sequence[Tensor], k: Sequence[Tensor]) -> list[Tensor]:
        """Softmax of the scores of each head, [E] each."""
        weights = []
        for q_h, k_h in zip(q, k, strict=True):
            s = row_dots(self.arrays, q_h, k_h, self.scale)
            p = _elementwise(_exp)(s, self.reduce(s, "max"), self.arrays.receiver)
            z = self.reduce(p, "sum")
            weights.append(_elementwise(_normalise)(p, z, self.arrays.receiver))
        return weights

    def backward(
        self, da: Tensor, a: Tensor, q: Tensor, k: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients by q and k of one head, from that by its weights `a`."""
        row_sum = self.reduce(_elementwise(_multiply)(a, da), "sum")
        ds = _elementwise(_softmax_backward)(a, da, row_sum, self.arrays.receiver, scale)
        dq = self.head_product(self.arrays.matrix(ds), k)
        return dq, self.head_product(self.arrays.transposed(ds), q)


class _AttentionDiffusion(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, parts: _Parts) -> Tensor:
        qk = torch.addmm(bias, x, weight.t())
        # of each head, [N, d_k], contiguous for the sparse products
        q, k = ([t.contiguous() for t in part.chunk(parts.heads, 1)] for part in qk.chunk(2, 1))
        del qk
        weights = parts.weights(q, k)
        a = _elementwise(_mean)(weights)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, weight, a, *q, *k, *weights)
            ctx.parts = parts
        return parts.product(parts.arrays.matrix(a), x).sub_(x)

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, *rest = ctx.saved_tensors
        parts: _Parts = ctx.parts
        heads = parts.heads
        q, k, weights = rest[:heads], rest[heads : 2 * heads], rest[2 * heads :]
        dx = parts.product(parts.arrays.transposed(a), df).sub_(df)
        da = row_dots(parts.arrays, df, x)
        dqk = x.new_empty(x.shape[0], weight.shape[0])
        dq, dk = dqk.chunk(2, 1)
        for h, (dq_h, dk_h) in enumerate(zip(dq.chunk(heads, 1), dk.chunk(heads, 1), strict=True)):
            scale = parts.scale / heads
            got_q, got_k = parts.backward(da, weights[h], q[h], k[h], scale)
            dq_h.copy_(got_q)
            dk_h.copy_(got_k)
        return dx.addmm_(dqk, weight), dqk.t() @ x, dqk.sum(0), None


class _EdgeAttention(AutogradFunction):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, parts: _Parts) -> Tensor:
        q_heads, k_heads = ([t[:, h].contiguous() for h in range(parts.heads)] for t in (q, k))
        weights = parts.weights(q_heads, k_heads)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*q_heads, *k_heads, *weights)
            ctx.parts = parts
        return torch.stack(weights, 1)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
        parts: _Parts = ctx.parts
        heads, saved = parts.heads, ctx.saved_tensors
        q, k, weights = saved[:heads], saved[heads : 2 * heads], saved[2 * heads :]
        da_heads = [da[:, h].contiguous() for h in range(heads)]
        given = zip(da_heads, weights, q, k, strict=True)
        dq, dk = zip(*(parts.backward(*some, parts.scale) for some in given), strict=True)
        return torch.stack(dq, 1), torch.stack(dk, 1), None


@lru_cache(maxsize=16)
def _elementwise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` fused into one pass by torch.compile; without a C++ compiler, as it is."""
    # dynamic: one compilation serves all graphs, so none falls into a measurement.
    return torch.compile(function, dynamic=True) if has_compiler() else function


def _exp(s: Tensor, top: Tensor, row: Tensor) -> Tensor:
    return torch.exp(s - top[row])


def _normalise(p: Tensor, z: Tensor, row: Tensor) -> Tensor:
    return p / z[row]


def _mean(weights: Sequence[Tensor]) -> Tensor:
    return sum(weights[1:], start=weights[0]) / len(weights)


def _multiply(a: Tensor, da: Tensor) -> Tensor:
    return a * da


def _softmax_backward(a: Tensor, da: Tensor, total: Tensor, row: Tensor, scale: float) -> Tensor:
    return a * (da - total[row]) * scale
