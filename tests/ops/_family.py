"""A member of the family as a call of the package and as one of the dense formulas."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import grand_fast as gf
from grand_fast import ops
from grand_fast.testing import GraphKind, random_edge_index
from tests._pairwise import Values, pairwise
from tests.ops import _dense
from tests.ops._problems import Inputs, compare, normal

PARAMETERS = ("sigma", "lengthscale")  # of the score exp_kernel


class Member(NamedTuple):
    """Score, normaliser and direction."""

    score: str
    normalizer: str
    normalize: str

    def __str__(self) -> str:
        return "-".join(self)


FAMILY = [Member(*member) for member in _dense.FAMILY]
EVERY = {"argvalues": FAMILY, "ids": str}


def members(
    strength: int = 2, *, where: Callable[[Member], bool] = lambda member: True, **options: Values
) -> pytest.MarkDecorator:
    """Parametrize by `member` and the `options`: every pair of score, normaliser, … (or triple)."""
    chosen = list(filter(where, FAMILY))
    fields = {f: list(dict.fromkeys(getattr(m, f) for m in chosen)) for f in Member._fields}
    rows = pairwise(strength, **fields, **options)
    return pytest.mark.parametrize(
        ("member", *options),
        [(Member(*row[:3]), *row[3:]) for row in rows.args[1]],
        ids=rows.kwargs["ids"],
    )


def edges_of(kind: GraphKind, n: int = 40) -> tuple[Tensor, int]:
    """`random_edge_index`, with hubs of some 280 edges: the dense arrays grow with them."""
    edges, n = random_edge_index(kind, n)
    return edges[:, :600], n


def problem(
    member: Member,
    edges: Tensor,
    n: int,
    *,
    d: int = 5,
    heads: int = 3,
    d_k: int = 4,
    weights: bool = True,
    source: bool = True,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Differentiable inputs in float64; `edge_weight` of both signs."""
    d_k = 1 if member.score == "gat" else d_k
    inputs = {
        "x": normal(n, d, seed=1),
        "q": normal(n, heads, d_k, seed=2, scale=scale),
        "k": normal(n, heads, d_k, seed=3, scale=scale),
        "alpha": normal(d, seed=4),
    }
    if source:
        inputs |= {"beta": normal(d, seed=5), "x0": normal(n, d, seed=6)}
    if weights:
        inputs["edge_weight"] = normal(edges.shape[1], seed=7)
    if member.score == "exp_kernel":
        length = max(1.7, 2 * scale)  # comparable to distances: scores neither all 0 nor all equal
        inputs |= {"sigma": normal(seed=8).abs() + 1, "lengthscale": torch.tensor(length).double()}
    return inputs


def without_state(inputs: Inputs) -> dict[str, Tensor]:
    """What `edge_attention` takes of them."""
    return {k: t for k, t in inputs.items() if k not in ("x", "alpha", "beta", "x0")}


def _options(member: Member, inputs: dict[str, Tensor]) -> dict[str, object]:
    own = {name: inputs.pop(name) for name in PARAMETERS if name in inputs}
    score = ops.ExpKernel(**own) if own else member.score
    return {**member._asdict(), "score": score}


def diffusion(member: Member, graph: gf.Graph) -> Callable[..., Tensor]:
    """`attention_diffusion` as a function of tensors and `backend`."""

    def call(backend: str, **inputs: Tensor) -> Tensor:
        options = _options(member, inputs)
        return ops.attention_diffusion(graph=graph, backend=backend, **inputs, **options)

    return call


def attention(
    member: Member, graph: gf.Graph, *, mean_heads: bool = False
) -> Callable[..., Tensor]:
    """`edge_attention` as a function of tensors and `backend`."""

    def call(backend: str, **inputs: Tensor) -> Tensor:
        options = {**_options(member, inputs), "mean_heads": mean_heads}
        return ops.edge_attention(graph=graph, backend=backend, **inputs, **options)

    return call


def compare_diffusion(
    member: Member, edges: Tensor, n: int, inputs: Inputs, backend: str, dtype: torch.dtype,
    tolerance: float | None = None,
) -> None:  # fmt: skip
    """`diffusion` in `dtype` with its formulas: the output and every gradient."""
    compare(
        diffusion(member, gf.Graph.from_edge_index(edges, n)), inputs, backend=backend,
        dtype=dtype, tolerance=tolerance, specification=dense_diffusion(member, edges),
    )  # fmt: skip


def compare_attention(
    member: Member, edges: Tensor, n: int, inputs: Inputs, backend: str, dtype: torch.dtype,
    tolerance: float | None = None, *, mean_heads: bool = False,
) -> None:  # fmt: skip
    """`attention`, likewise, of those inputs that it takes."""
    compare(
        attention(member, gf.Graph.from_edge_index(edges, n), mean_heads=mean_heads),
        without_state(inputs), backend=backend, dtype=dtype, tolerance=tolerance,
        specification=dense_attention(member, edges, mean_heads=mean_heads),
    )  # fmt: skip


def dense_diffusion(member: Member, edges: Tensor) -> Callable[..., Tensor]:
    """The formulas of `diffusion`."""
    return lambda **inputs: _dense.attention_diffusion(edges=edges, **inputs, **member._asdict())


def dense_attention(
    member: Member, edges: Tensor, *, mean_heads: bool = False
) -> Callable[..., Tensor]:
    """The formulas of `attention`."""

    def call(**inputs: Tensor) -> Tensor:
        a = _dense.edge_attention(edges=edges, **inputs, **member._asdict())
        return a.mean(1) if mean_heads else a

    return call
