"""Attention weights that stand for themselves until somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grand_fast.compat.deferred import AbstractRecipe, Deferred, defer, write
from grand_fast.compat.graphs import product
from grand_fast.compat.rest import Rest
from grand_fast.graph import Graph
from grand_fast.ops import ExpKernel, attention_diffusion, edge_attention
from grand_fast.ops.edge_attention import EdgeOrder

_ITEMS = (Tensor.__getitem__,)
_MEANS = (Tensor.mean, torch.mean)


class Formula(NamedTuple):
    """What weights a layer computes of its queries and keys.

    score, normalizer, normalize: as of `gf.ops.edge_attention`.
    reweights: whether the layer's edge weights multiply the scores.
    """

    score: str = "scaled_dot"
    normalizer: str = "softmax"
    normalize: str = "receiver"
    reweights: bool = False


class Weights(AbstractRecipe):
    """The weights `[E, H]` of a layer's heads, which `times` need not write out.

    Args:
        formula: what they are.
        x: the state they were computed from, `[N, d]`. Weights that meet it are used once, as a
            rule; those that meet another are of a linear field, and worth writing out.
        q, k: its queries and keys, `[N, H, d_k]`, which nobody else holds.
        graph: the edges.
        rest: the layer's own results.
        edge_weight, sigma, lengthscale: where the formula has them; copied.
    """

    def __init__(
        self,
        formula: Formula,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        graph: Graph,
        rest: Rest,
        edge_weight: Tensor | None,
        sigma: Tensor | None,
        lengthscale: Tensor | None,
    ) -> None:
        super().__init__()
        self.formula, self.graph, self.rest = formula, graph, rest
        self.x = x
        own = (None if t is None else t.clone() for t in (edge_weight, sigma, lengthscale))
        self.inputs = (q, k, *own)
        self._mean: Tensor | None = None

    def compute(self, *inputs: Tensor | None) -> Tensor:
        """The weights `[E, H]`, in the user's order."""
        q, k, options = self._options(*inputs)
        return edge_attention(q, k, self.graph, **options)

    def value(self) -> Tensor:
        """Those of the layer itself, where they can be had: to a threshold, ties must be ties."""
        theirs = self.rest.weights(self)
        return super().value() if theirs is None else theirs

    def compute_mean(self, *inputs: Tensor | None, edge_order: EdgeOrder = "csr") -> Tensor:
        """Their mean over the heads `[E]`."""
        q, k, options = self._options(*inputs)
        return edge_attention(q, k, self.graph, mean_heads=True, edge_order=edge_order, **options)

    def mean(self) -> Tensor:
        """Their mean `[E]` in CSR order, computed once."""
        if self._mean is None:
            with self.mode():
                self._mean = self.compute_mean(*self.inputs)
        return self._mean

    @property
    def has_no_mean(self) -> bool:
        """Whether nobody has asked for the mean as yet."""
        return self._mean is None

    def times(self, x: Tensor, head: int | None = None) -> Tensor:
        """The mean of `A^h x`, or that of one head, in one pass over the edges."""
        q, k, options = self._options(*self.inputs)
        if head is not None:
            q, k = q[:, head : head + 1], k[:, head : head + 1]
        return attention_diffusion(x, q, k, self.graph, add=[(1.0, x)], **options)

    def field(self, **coefficients: Any) -> Tensor:
        """`alpha (A x − x) + beta x0` of the state they were computed from, in that one pass."""
        q, k, options = self._options(*self.inputs)
        return attention_diffusion(self.x, q, k, self.graph, **coefficients, **options)

    def _options(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        q, k, edge_weight, sigma, lengthscale = inputs
        assert q is not None and k is not None
        score: Any = self.formula.score
        if sigma is not None and lengthscale is not None:
            score = ExpKernel(sigma, lengthscale)
        return q, k, {
            "score": score,
            "normalizer": self.formula.normalizer,
            "normalize": self.formula.normalize,
            "edge_weight": edge_weight,
        }  # fmt: skip

    def shortcut(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
        """The mean over heads, and one head, stay unwritten too."""
        values = args[0]
        if func in _MEANS and _is_over_heads(*args[1:], **kwargs):
            return defer(Mean(self), values.shape[:1], values)
        if func in _ITEMS and (head := _one_head(args[1], values.shape[1])) is not None:
            return defer(Head(values, head), values.shape[:1], values)
        return None


def _is_over_heads(dim: Any = None, keepdim: Any = False, **further: Any) -> bool:
    return dim in (1, -1, (1,), [1]) and not keepdim and not further


def _one_head(index: Any, heads: int) -> int | None:
    """The head that `weights[index]` are the weights of, if they are of one."""
    if not isinstance(index, tuple) or len(index) != 2:
        return None
    if not isinstance(index[0], slice) or index[0] != slice(None):
        return None
    head = index[1]
    is_head = isinstance(head, int) and not isinstance(head, bool) and -heads <= head < heads
    return head % heads if is_head else None


class Mean(AbstractRecipe):
    """The mean over heads `[E]` of weights."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights, self.inputs = weights, weights.inputs

    def compute(self, *inputs: Tensor | None) -> Tensor:
        """In the user's order."""
        return self.weights.compute_mean(*inputs, edge_order="user")

    def value(self) -> Tensor:
        """That of the layer's own weights, where they can be had."""
        theirs = self.weights.rest.weights(self.weights)
        if theirs is None:
            return super().value()
        with self.mode():
            return theirs.mean(1)

    def times(self, x: Tensor, graph: Graph) -> tuple[Tensor, bool] | None:
        """`A x` on the weights' own graph, and whether in one pass with the attention."""
        if graph is not self.weights.graph:
            return None
        if x is self.weights.x and self.weights.has_no_mean:
            return self.weights.times(x), True
        return product(self.weights.mean(), x, graph, edge_order="csr"), False


class Head(AbstractRecipe):
    """The weights `[E]` of one head: a part of the weights of all, in their memory."""

    def __init__(self, values: Deferred, head: int) -> None:
        super().__init__()
        self.values, self.head, self.base = values, head, values
        self.weights: Weights = values.recipe  # type: ignore[assignment]
        self.inputs = self.weights.inputs

    def compute(self, *inputs: Tensor | None) -> Tensor:
        """In the user's order."""
        return self.weights.compute(*inputs)[:, self.head]

    def value(self) -> Tensor:
        """A view."""
        with self.mode():
            return write(self.values)[:, self.head]

    def times(self, x: Tensor, graph: Graph) -> tuple[Tensor, bool] | None:
        """`A x`, in one pass with the attention of this head; None if that cannot be."""
        is_own = graph is self.weights.graph and x is self.weights.x
        if not is_own or self.values.written is not None:
            return None
        return self.weights.times(x, self.head), True
