"""Which of our attention weights a layer computes: asked of a copy with random weights.

The weights that layers start with tell no scores apart: constants of 1e-5 in the released code.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from grand_fast.compat.active import paused
from grand_fast.compat.projections import projections
from grand_fast.compat.rest import Kind, kind_of
from grand_fast.compat.state import State
from grand_fast.compat.weights import Formula
from grand_fast.graph import Graph
from grand_fast.ops import ExpKernel, edge_attention

# Names of the released code
SCORES = {"scaled_dot": "scaled_dot", "cosine_sim": "cosine", "pearson": "pearson",
          "exp_kernel": "exp_kernel"}  # fmt: skip
CHANGES = "its forward changes the layer or its input"
_RTOL = 1e-9  # of float64
_SIZES = (11, 13, 17, 19, 23, 29, 31, 37)  # numbers of nodes; of edges, five times as many and 2


class Found(NamedTuple):
    """A layer's formula.

    rest: what it returns beside the weights; None if it returns them alone.
    """

    formula: Formula
    rest: list[Kind] | None


def probe(layer: Any, forward: Callable[..., Any], *, verify: bool) -> Found | str:
    """The formula of a layer, or in words why none of ours is its own.

    Args:
        forward: of its class.
        verify: whether weights and gradients of the copy must agree with it, to 1e-9 in float64;
            otherwise the layer's options are believed.
    """
    devices = [layer.Q.weight.device] if layer.Q.weight.is_cuda else []
    try:
        with (
            torch.random.fork_rng(devices),
            paused(),
            torch.inference_mode(False),
            torch.enable_grad(),
            # Not the caller's: a checkpoint counts what is saved
            saved_tensors_hooks(lambda t: t.detach(), lambda t: t),
        ):
            return _Copy(layer, forward).find(verify)
    except Exception as error:  # whatever a stranger's code raises, and says so itself when run
        return f"its copy failed: {type(error).__name__}: {error}".splitlines()[0]


class _Copy:
    """A copy of a layer in float64, with random weights, on a small random graph."""

    def __init__(self, layer: Any, forward: Callable[..., Any]) -> None:
        self.forward = forward
        device, d = layer.Q.weight.device, layer.Q.in_features
        random = torch.Generator().manual_seed(0)
        taken = {d, layer.h, layer.d_k, layer.h * layer.d_k}
        self.n = next(n for n in _SIZES if not {n, 5 * n + 2} & taken)

        def uniform(*shape: int) -> Tensor:
            return (0.5 + torch.rand(shape, generator=random, dtype=torch.float64)).to(device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(device)

        edge = torch.randint(0, self.n - 1, (2, 5 * self.n + 2), generator=random)
        self.edge = edge.to(device)
        self.x = normal(self.n, d).requires_grad_()
        self.direction = normal(edge.shape[1], layer.h)
        weight = getattr(layer, "edge_weights", None)
        self.weight = uniform(edge.shape[1]) if isinstance(weight, Tensor) else None
        options = getattr(layer, "opt", None)
        self.options = options if isinstance(options, dict) else {}
        memo: dict[int, Any] = {} if self.weight is None else {id(weight): self.weight}
        self.layer: Any = copy.deepcopy(layer, memo).double()
        for p in self.layer.parameters():
            value = normal(*p.shape) * p.shape[-1] ** -0.5 if p.dim() > 1 else uniform(*p.shape)
            p.data.copy_(value)
            p.requires_grad_()
        for t in State(self.layer).tensors:  # of ones, what they do would not be seen
            if t.is_floating_point() and t is not self.weight:
                t.data.copy_(uniform(*t.shape))

    def find(self, verify: bool) -> Found | str:
        """Their weights, against each of ours."""
        before = State(self.layer)
        result = self.forward(self.layer, self.x, self.edge)
        attention = result[0] if isinstance(result, tuple) else result
        shape = (self.edge.shape[1], self.layer.h)
        if not isinstance(attention, Tensor) or attention.shape != shape:
            return "it returns no weights [E, H]"
        if self.x._version or not State(self.layer).is_like(before, parameters=True):
            return CHANGES
        again = self.forward(self.layer, self.x, self.edge)
        if not torch.equal(again[0] if isinstance(again, tuple) else again, attention):
            return "its forward is not the same twice"
        sizes = {self.n: "N", self.edge.shape[1]: "E"}
        try:
            rest = [kind_of(r, sizes) for r in result[1:]] if isinstance(result, tuple) else None
        except TypeError as error:
            return str(error)
        formulas = self._formulas()
        if not verify:
            return Found(next(formulas), rest)
        for formula in formulas:
            ours = self._ours(formula)
            if _agree(attention, ours):
                differs = self._differing_gradient(attention, ours)
                return Found(formula, rest) if differs is None else differs
        return "its weights are none of ours: the probe disagrees"

    def _formulas(self) -> Iterator[Formula]:
        """That of the layer's options, then all others."""
        option = self.options.get
        score = SCORES.get(option("attention_type", "scaled_dot"), "scaled_dot")
        has_kernel = all(hasattr(self.layer, n) for n in ("output_var", "lengthscale"))
        likely = Formula(
            score if has_kernel or score != "exp_kernel" else "scaled_dot",
            "squareplus" if option("square_plus") else "softmax",
            "sender" if option("attention_norm_idx") == 1 else "receiver",
            bool(option("reweight_attention")) and self.weight is not None,
        )
        yield likely
        scores = [s for s in SCORES.values() if has_kernel or s != "exp_kernel"]
        weighted = (False, True) if self.weight is not None else (False,)
        for values in itertools.product(
            scores, ("softmax", "squareplus"), ("receiver", "sender"), weighted
        ):
            if Formula(*values) != likely:
                yield Formula(*values)

    def _ours(self, formula: Formula) -> Tensor:
        layer = self.layer
        score: Any = formula.score
        if score == "exp_kernel":
            score = ExpKernel(layer.output_var, layer.lengthscale)
        q, k = projections(layer, self.x)
        graph = Graph.from_edge_index(self.edge, self.n, flow="target_to_source")
        return edge_attention(
            q, k, graph, score=score, normalizer=formula.normalizer, normalize=formula.normalize,
            edge_weight=self.weight if formula.reweights else None, backend="reference",
        )  # fmt: skip

    def _differing_gradient(self, theirs: Tensor, ours: Tensor) -> str | None:
        names, parameters = zip(*self.layer.named_parameters(), strict=True)
        gradients = [
            torch.autograd.grad(
                (a * self.direction).sum(), (self.x, *parameters), allow_unused=True
            )
            for a in (theirs, ours)
        ]
        for name, a, b in zip(("x", *names), *gradients, strict=True):
            a, b = (torch.zeros(()) if g is None else g for g in (a, b))
            if not _agree(a, b):
                return f"its gradient by {name} is not ours: the probe disagrees"
        return None


def _agree(theirs: Tensor, ours: Tensor) -> bool:
    size = max(float(theirs.detach().abs().max()), float(ours.detach().abs().max()), 1e-3)
    return float((theirs - ours).detach().abs().max()) <= _RTOL * size
