"""In the place of the forward of an attention layer of the released code: weights unwritten.

A class is of this kind by its name, or by what its code names: `Q`, `K`, `h` and `d_k`, and a
forward of a state and edges. Which weights a layer computes is found by `probe`, on a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from grand_fast.compat.active import active, unusual
from grand_fast.compat.deferred import defer
from grand_fast.compat.graphs import graph_of
from grand_fast.compat.options import Report
from grand_fast.compat.probe import CHANGES, Found, probe
from grand_fast.compat.projections import projections, unlike
from grand_fast.compat.rest import Rest
from grand_fast.compat.state import State
from grand_fast.compat.weights import Weights

CLASS_NAMES = ("SpGraphTransAttentionLayer",)
_NAMES = {"Q", "K", "h", "d_k"}
Forward = Callable[..., Any]


def is_one(cls: type) -> bool:
    """Whether a class defines the forward of such a layer itself."""
    code = getattr(vars(cls).get("forward"), "__code__", None)
    if code is None or hasattr(vars(cls)["forward"], "_theirs") or code.co_argcount != 3:
        return False
    of_init = getattr(getattr(cls, "__init__", None), "__code__", None)
    return cls.__name__ in CLASS_NAMES or (of_init is not None and set(of_init.co_names) >= _NAMES)


def hooked(forward: Forward) -> Forward:
    """`forward` of a class, or in its place deferred weights, while a patch covers the layer."""

    @functools.wraps(forward)
    def deferring(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        patch = active("attention")
        if patch is None:
            return forward(self, *args, **kwargs)
        answer = _ours(self, forward, args, kwargs, patch.report, verify=patch.verify)
        return forward(self, *args, **kwargs) if answer is None else answer

    deferring._theirs = forward  # type: ignore[attr-defined]
    return deferring


_KEPT = 4  # states of a layer: training, evaluation, …
_probed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # layer → its states, what was found of each


def _ours(
    layer: Any, forward: Forward, args: Any, kwargs: Any, report: Report, *, verify: bool
) -> Any:
    name = type(layer).__name__
    reason = unusual() or _not_ours(args, kwargs) or unlike(layer)
    found: Found | str | None = None
    if reason is None:
        try:
            state = State(layer)
            found = _find(layer, forward, state, verify)
        except TypeError as error:
            reason = str(error)
    if isinstance(found, Found):
        try:
            graph = graph_of(args[1], args[0].shape[0])
        except (TypeError, ValueError) as error:
            found, reason = None, str(error)
    elif isinstance(found, str):
        reason = found
    if reason is not None or not isinstance(found, Found):
        report.leave(name, reason or "")
        return None
    report.use(name)
    x, edge = args
    weight = getattr(layer, "edge_weights", None) if found.formula.reweights else None
    q, k = projections(layer, x)
    sigma, lengthscale = (
        getattr(layer, n) if found.formula.score == "exp_kernel" else None
        for n in ("output_var", "lengthscale")
    )
    rest = Rest(layer, forward, x, edge, state, (q, k))
    weights = Weights(found.formula, x, q, k, graph, rest, weight, sigma, lengthscale)
    sizes = {"N": x.shape[0], "E": edge.shape[1]}
    attention = defer(weights, (edge.shape[1], layer.h), q)
    if found.rest is None:
        return attention
    return attention, *(rest.stand_in(i, kind, sizes) for i, kind in enumerate(found.rest, 1))


def _not_ours(args: Any, kwargs: Any) -> str | None:
    if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
        return "it is called with something else than a state and edges"
    x, edge = args
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64) or not len(x):
        return "its state is not [N, d] of float32 or float64"
    if edge.dim() != 2 or edge.shape[0] != 2 or edge.dtype != torch.int64:
        return "its edges are not [2, E] of int64"
    return None


def _find(layer: nn.Module, forward: Forward, state: State, verify: bool) -> Found | str:
    """The layer's formula, or why it has none of ours; found once for each state of the layer."""
    known = _probed.get(layer, [])  # type: ignore[no-untyped-call]
    for before, *how, found in known:
        if how == [forward, verify] and (
            found == CHANGES or before.is_like(state, parameters=False)
        ):
            result: Found | str = found
            return result
    result = probe(layer, forward, verify=verify)
    _probed[layer] = [*known[1 - _KEPT :], (state, forward, verify, result)]
    return result
