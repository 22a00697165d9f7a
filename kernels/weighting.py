"""How the dot product of an edge becomes its weight: what the attention's kernels are compiled for.

Every score of the family is one function of a dot product, once each node's query and key are
prepared (`ops/scores.py`): normalised, centred, or given columns for what does not depend on the
other node. So kernels know three functions, two normalisers and two directions, and no score.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from grand_fast.kernels.csr import Csr


@dataclass(frozen=True)
class Weighting:
    """`u = scale · <q_i, k_j>`, `s = φ(u) · w_ij`, `a = p(s) / Σ p`; alike for all edges and heads.

    scale:      of the dot product.
    function:   φ(u): `"identity"` u; `"exp"` eᵘ; `"leaky_relu"` u above 0, `slope` · u below.
    slope:      of `"leaky_relu"`.
    normalizer: p(s): `"softmax"` eˢ; `"squareplus"` (v + √(v² + 4)) / 2 with v = s − top ≤ 0, where
                `top` is the largest score of all edges and heads: written 2 / (√(v² + 4) − v), it
                keeps its digits where v is large.
    normalize:  Σ over the edges of a `"receiver"`, or over those of a `"sender"`.

    What kernels save of a group are two numbers a head, `norm [N, 2, H]`: the shift of its scores,
    their maximum for softmax and 0 for squareplus, and 1 / Σ p(s − shift); −inf or 0, and inf,
    without edges. One number, log Σ eˢ, would be rounded at the size of the scores: at s = 10⁴ no
    weight would keep three digits, and rows of weights would sum to anything near 1. With t
    the gradient by a, and Δ = Σ a t over the group, ds = a ρ (t − Δ): ρ = 1 for softmax and
    1 / √(v² + 4) for squareplus. dw = φ ds summed over heads, dtop = −Σ ds over all edges and
    heads, du = w φ' ds with φ' = 1, eᵘ, and 1 or `slope` (at 0 `slope`, as torch has it).
    """

    scale: float
    function: Literal["identity", "exp", "leaky_relu"] = "identity"
    slope: float = 0.0
    normalizer: Literal["softmax", "squareplus"] = "softmax"
    normalize: Literal["receiver", "sender"] = "receiver"

    def groups(self, csr: Csr, csr_t: Csr | None) -> Csr:
        """The view whose rows are the groups."""
        if self.normalize == "receiver":
            return csr
        assert csr_t is not None
        return csr_t


def scaled_dot(d_k: int) -> Weighting:
    """The paper's: a softmax of `<q_i, k_j> / √d_k` over the senders of a receiver."""
    return Weighting(scale=1 / math.sqrt(d_k))


# Whence the gradient by the weights: the state, `da [E, H]`, or `da [E]` by the mean over heads; or
# values per head, of each head's sum or of their mean.
Source = Literal["state", "heads", "mean", "values", "mean of values"]


@dataclass(frozen=True)
class Upstream:
    """What the gradient by the weights is made of: `da`, or `df`, `x` and `alpha` of a diffusion.

    Of a product: `df`, dy, and `x`, the values, `[N, H, d]`; dy is `[N, d]` if it is by a mean.
    edge_value: what edges add to the values, `[E, H, d]` in slot order of `A`.
    x_scale: coefficient of `x` in what was added to the field, so of `df` in `dx`.
    """

    da: Tensor | None = None
    df: Tensor | None = None
    x: Tensor | None = None
    alpha: Tensor | None = None
    x_scale: float = 0.0
    edge_value: Tensor | None = None

    @property
    def source(self) -> Source:
        """Which of them."""
        if self.da is not None:
            return "mean" if self.da.dim() == 1 else "heads"
        assert self.df is not None and self.x is not None
        of: dict[int, Source] = {4: "state", 5: "mean of values", 6: "values"}
        return of[self.df.dim() + self.x.dim()]

    @property
    def channels(self) -> int:
        """`d` of the state or the values; 0 without."""
        return 0 if self.x is None else self.x.shape[-1]

    def arguments(self) -> dict[str, Any]:
        """What there is of it, by name."""
        named = {"df": self.df, "x": self.x, "alpha": self.alpha, "da": self.da}
        named["edge_value"] = self.edge_value
        return {name: value for name, value in named.items() if value is not None}

    def heads_of_mean(self, h: int) -> int:
        """What the gradient by a score is divided by; a mean counts each of its heads 1/H."""
        return 1 if self.source in ("heads", "values") else h

    def swapped(self) -> "Upstream":
        """As seen from the far ends of the edges."""
        return replace(self, df=self.x, x=self.df)


class AttentionGradients(NamedTuple):
    """What a backward launcher returns; None where it is not needed or does not exist.

    dx: [N, d]; dq, dk: [N, H, d_k]; dalpha: [d]; dedge_weight: [E], slot order of `A`;
    dtop: [], by the largest score as if it were an input.
    """

    dx: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dalpha: Tensor | None = None
    dedge_weight: Tensor | None = None
    dtop: Tensor | None = None


class ProductGradients(NamedTuple):
    """What the backward of an attention's product returns; None where it is not needed.

    dv: [N, H, d]; dq, dk: [N, H, d_k]; dedge_key: [E, H, d_k], dedge_value: [E, H, d] and
    dedge_weight: [E], slot order of `A`; dtop: [], by the largest score as if it were an input.
    """

    dv: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dedge_key: Tensor | None = None
    dedge_value: Tensor | None = None
    dedge_weight: Tensor | None = None
    dtop: Tensor | None = None
