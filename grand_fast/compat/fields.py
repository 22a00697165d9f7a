"""In the place of the forward of a vector field of the released code: one operator.

Fields that look alike differ by a sign, a factor or the name of their source: one is ours only if
its code is, token by token, what is known here; also where it stands in other people's code.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from grand_fast.compat.active import active, unusual
from grand_fast.compat.deferred import Deferred, write
from grand_fast.compat.graphs import graph_of
from grand_fast.compat.spmm import spmm
from grand_fast.compat.weights import Mean, Weights
from grand_fast.graph import Graph
from grand_fast.ops import csr_diffusion

Kind = Literal["transformer", "laplacian"]
Forward = Callable[..., Tensor]
# SHA-256 of the tokens of the released forwards, and of the method that multiplies by A
FORWARDS: dict[str, Kind] = {
    "f63ba0d55dc43e137b9a4cea2e9f443564204c8b76d747621e92bfd88319228c": "transformer",
    "ee81a1ea7dbde64e6b0a933dff894d6e9e0e7d9140d8afebfdf06326361c94b9": "laplacian",
}
PRODUCTS: dict[str, Kind] = {
    "3a57d31c8c4d306971d2ca42826fa688c4551c8949f28a120ae6cdc1a1366744": "transformer",
    "57063f480082b6841928b2f4f79bc095e3dfcfc7b06d41789aa2c2b52f846e31": "laplacian",
}
_METHODS: dict[Kind, str] = {
    "transformer": "multiply_attention",
    "laplacian": "sparse_multiply",
}
_NAMES = {"nfe", "opt", "alpha_train", "beta_train", "x0"}
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)


@functools.lru_cache(maxsize=256)
def fingerprint(function: Callable[..., Any]) -> str | None:
    """Of a function's source without comments and spacing; None where there is no source.

    None of one that wraps another, too: `inspect` would give the source of that.
    """
    if hasattr(function, "__wrapped__"):
        return None
    try:
        source = textwrap.dedent(inspect.getsource(function))
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return None
    kinds = {tokenize.INDENT: ">", tokenize.DEDENT: "<", tokenize.NEWLINE: ";"}
    words = [kinds.get(t.type, t.string) for t in tokens if t.type not in _LAYOUT]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def is_one(cls: type) -> bool:
    """Whether a class defines a forward that is known."""
    forward = vars(cls).get("forward")
    code = getattr(forward, "__code__", None)
    if code is None or hasattr(forward, "_theirs") or not set(code.co_names) >= _NAMES:
        return False
    return fingerprint(forward) in FORWARDS


def hooked(forward: Forward) -> Forward:
    """`forward` of a class, or in its place one operator, while a patch covers the field."""
    kind = FORWARDS[fingerprint(forward)]  # type: ignore[index]

    @functools.wraps(forward)
    def fused(self: Any, t: Any, x: Any) -> Tensor:
        patch = active("fields")
        if patch is None:
            return forward(self, t, x)
        name = f"{type(self).__name__}, whole field"
        found = unusual() or _not_ours(self, x, kind) or _ours(self, x, kind)
        if isinstance(found, Tensor):
            patch.report.use(name)
            return found
        patch.report.leave(name, found)
        return forward(self, t, x)

    fused._theirs = forward  # type: ignore[attr-defined]
    return fused


def _not_ours(field: Any, x: Any, kind: Kind) -> str | None:
    method = _METHODS[kind]
    product: Any = getattr(type(field), method, None)
    if method in vars(field) or PRODUCTS.get(fingerprint(product) or "") != kind:
        return f"its {method} is another than the released one"
    if getattr(product.__globals__.get("torch_sparse"), "spmm", None) is not spmm:
        return "torch_sparse.spmm is left"
    if field.opt.get("mix_features") and kind == "transformer":
        return "it mixes features"
    if type(x) is not Tensor or x.dim() != 2 or x.dtype not in (torch.float32, torch.float64):
        return "its state is not [N, d] of float32 or float64"
    given = [field.alpha_train, *_source(field)]
    if any(t is not None and (type(t) not in _TENSORS or t.dtype != x.dtype) for t in given):
        return "its coefficients or its source are of another type than its state"
    beta, x0 = given[1:]
    if any(t is not None and (t.numel() != 1 or t.dim() > 2) for t in (field.alpha_train, beta)):
        return "its coefficients are no single numbers"
    if field.opt["add_source"] and (x0 is None or x0.shape != x.shape):
        return "its source is not like its state"
    if field.nfe > field.opt["max_nfe"]:
        return "it is evaluated too often"
    return None


_TENSORS = (Tensor, torch.nn.Parameter)


def _source(field: Any) -> tuple[Any, Any]:
    return (field.beta_train, field.x0) if field.opt["add_source"] else (None, None)


def _coefficients(field: Any) -> dict[str, Any]:
    """`alpha`, and `beta` and `x0` where there is a source."""
    alpha = field.alpha_train
    if not field.opt["no_alpha_sigmoid"]:
        alpha = torch.sigmoid(alpha)
    beta, x0 = _source(field)
    return {
        "alpha": alpha.reshape(()),
        "beta": None if beta is None else beta.reshape(()),
        "x0": x0,
    }


def _ours(field: Any, x: Tensor, kind: Kind) -> Tensor | str:
    """The field by one operator, or why not by us."""
    try:
        graph = graph_of(field.edge_index, len(x))
    except (TypeError, ValueError) as error:
        return str(error)
    return _transformer(field, x, graph) if kind == "transformer" else _laplacian(field, x, graph)


def _transformer(field: Any, x: Tensor, graph: Graph) -> Tensor:
    """`alpha (A(x) x − x) + beta x0`."""
    field.nfe += 1
    attention, values = field.multihead_att_layer(x, field.edge_index)
    coefficients = _coefficients(field)
    if isinstance(attention, Deferred) and attention.written is None:
        weights = attention.recipe
        if isinstance(weights, Weights) and weights.x is x and weights.graph is graph:
            return weights.field(**coefficients)
    f: Tensor = coefficients["alpha"] * (field.multiply_attention(x, attention, values) - x)
    return f if coefficients["x0"] is None else f + coefficients["beta"] * coefficients["x0"]


def _laplacian(field: Any, x: Tensor, graph: Graph) -> Tensor | str:
    """`alpha (A x − x) + beta x0` of weights that are given; or why not by us."""
    block, values = field.opt["block"], field.edge_weight
    if block == "attention":
        values = field.attention_weights.mean(dim=1)
    elif block in ("mixed", "hard_attention"):
        values = field.attention_weights
    order: Any = "user"
    if isinstance(values, Deferred):
        mean = values.recipe
        if values.written is None and isinstance(mean, Mean) and mean.weights.graph is graph:
            values, order = mean.weights.mean(), "csr"
        else:
            values = write(values)
    if values.shape != (graph.num_edges,) or values.dtype != x.dtype:
        return "its weights are not [E] of the type of its state"
    field.nfe += 1
    return csr_diffusion(x, values, graph, edge_order=order, **_coefficients(field))
