"""Which edges of a graph are kept for a solve, by their attention at x(0)."""

import math

import torch
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.nn.attention_diffusion import AttentionDiffusion


def check_thinning(variant: str, threshold: float | None, quantile: float | None) -> None:
    """At most one of the two, within [0, 1), for a variant that has a first attention to go by."""
    given = {"attention_threshold": threshold, "attention_quantile": quantile}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) == 2:
        raise ValueError(
            f"GRAND: `attention_threshold` must come without attention_quantile, got {threshold} "
            f"and {quantile}. Give one of them."
        )
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"GRAND: `{name}` must be a float, got {type(value).__name__}.")
        if not 0 <= value < 1:
            raise ValueError(f"GRAND: `{name}` must lie in [0, 1), got {value}.")
        if variant not in ("l", "nl-rw"):
            remedy = " Did you mean 'nl-rw'?" if variant == "nl" else ""
            raise ValueError(
                f"GRAND: `{name}` must come with variant l or nl-rw, got {variant!r}.{remedy}"
            )


def thinned(
    field: AttentionDiffusion,
    x0: Tensor,
    graph: Graph,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
) -> Graph:
    """The edges whose mean attention over the heads at the state `x0` is above a value.

    Either `threshold` itself, or the value that the share `quantile` of the edges is not above.
    Which edges are kept has no gradient; what is then computed on them has.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "GRAND: `attention_threshold` and `attention_quantile` must be None in a compiled or "
            "exported program, got one of them: the values say which edges there are. Compile "
            "without fullgraph."
        )
    with torch.no_grad():
        a = field.attention(x0, graph, mean_heads=True)
    if quantile is None:
        assert threshold is not None
        return graph.keep_edges(a > threshold)
    if a.numel() == 0:
        return graph
    # Above this edge's value are just those above the quantile, which lies between it and the
    # next. torch.quantile takes no more than 2^24 values.
    rank = math.floor(quantile * (a.numel() - 1)) + 1
    return graph.keep_edges(a > a.kthvalue(rank).values)
