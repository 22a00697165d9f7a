"""The scores of the attention: what each makes of queries and keys before the kernels see them.

The kernels know functions of dot products only (`Weighting`). A score prepares the vectors of each
node once, in plain PyTorch and so differentiable, such that their dot product is its own argument.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grand_fast.kernels.weighting import Weighting
from grand_fast.ops.checks import check_choice, check_float, message

NORMALIZERS = ("softmax", "squareplus")
DIRECTIONS = ("receiver", "sender")
EPS = 1e-5  # of the cosine, as in the paper's released code
_KEYS_OF_MIDDLE = 256


def _scalar(name: str, value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            got = f"{value.dtype} of shape {list(value.shape)}"
            raise ValueError(message("ExpKernel", name, "must be a floating scalar", got))
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = type(value).__name__
        raise TypeError(message("ExpKernel", name, "must be a float or a scalar Tensor", got))
    if not isfinite(value) or value == 0:
        raise ValueError(message("ExpKernel", name, "must be finite and not 0", str(value)))
    return float(value)


Pair = tuple[Tensor, Tensor]
# By q, k, σ and ℓ
ScoreGradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class AbstractScore(ABC):
    """`s_ij` of an edge `j → i`, for each head, from `q_i` and `k_j`."""

    name: str
    more_columns = 0  # than q and k have, in what `prepare` makes of them

    def about(self, k: Tensor) -> "AbstractScore":
        """The score for some rows of q and k at a time, `k` being all keys."""
        return self

    @abstractmethod
    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors `[N, H, d]` whose dot product, times `weighting(d_k).scale`, is `u`."""

    def prepare_edges(self, edge_key: Tensor) -> Tensor | None:
        """Vectors `[E, H, d]` to add to the keys that `prepare` made; None: not such a score."""
        return None

    @abstractmethod
    def weighting(self, d_k: int) -> Weighting:
        """Scale of the dot product, and `s` as a function of `u`."""

    def parameters(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """σ and ℓ, where it has them, on the device of `like`, in its dtype or a wider one."""
        return None, None

    @abstractmethod
    def gradients(self, given: Pair, made: Pair, of_made: Pair) -> ScoreGradients:
        """Backward of `prepare`: `given` q and k, what it `made` of them and the gradients by that.

        The latter may be written over, and are the result where they have the shape of `given`.
        Plain arithmetic without a graph, which would hold some ten tensors like q.
        """


class ScaledDot(AbstractScore):
    """`s_ij = <q_i, k_j> / √d_k`; GRAND (Chamberlain et al. 2021), equation 10."""

    name = "scaled_dot"

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as they are."""
        return q, k

    def prepare_edges(self, edge_key: Tensor) -> Tensor:
        """As they are."""
        return edge_key

    def gradients(self, given: Pair, made: Pair, of_made: Pair) -> ScoreGradients:
        """Those by q and k, as they are."""
        return *of_made, None, None

    def weighting(self, d_k: int) -> Weighting:
        """`s = u`, the dot product over `√d_k`."""
        return Weighting(scale=1 / sqrt(d_k))


class Cosine(AbstractScore):
    """`s_ij = <q_i, k_j> / (max(|q_i|, eps) max(|k_j|, eps))`, eps = 1e-5."""

    name = "cosine"

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of length 1, or shorter where they are shorter than eps."""
        return functional.normalize(q, dim=2, eps=EPS), functional.normalize(k, dim=2, eps=EPS)

    def gradients(self, given: Pair, made: Pair, of_made: Pair) -> ScoreGradients:
        """Across the vector, over its length; along it too where it is shorter than eps."""
        for v, unit, g in zip(given, made, of_made, strict=True):
            length = torch.linalg.vector_norm(v, dim=2, keepdim=True)
            along = (unit * g).sum(2, keepdim=True).masked_fill_(length < EPS, 0.0)
            g.addcmul_(unit, along, value=-1.0).div_(length.clamp_min_(EPS))
        return *of_made, None, None

    def weighting(self, d_k: int) -> Weighting:
        """`s = u`, the dot product of vectors of length 1."""
        return Weighting(scale=1.0)


class Pearson(Cosine):
    """The cosine of `q_i` and `k_j`, each less its mean over `d_k`: their correlation."""

    name = "pearson"

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Centred, then of length 1."""
        return super().prepare(*_centred(q, k))

    def gradients(self, given: Pair, made: Pair, of_made: Pair) -> ScoreGradients:
        """That of the cosine, centred too."""
        super().gradients(_centred(*given), made, of_made)
        for g in of_made:
            g.sub_(g.mean(2, keepdim=True))
        return *of_made, None, None


def _centred(q: Tensor, k: Tensor) -> Pair:
    return q - q.mean(2, keepdim=True), k - k.mean(2, keepdim=True)


class ExpKernel(AbstractScore):
    """`s_ij = σ² exp(−|q_i − k_j|² / (2 ℓ²))`.

    Args:
        sigma: `σ`, a float or a scalar tensor, not 0.
        lengthscale: `ℓ`, a float or a scalar tensor, not 0; in the units of `q` and `k`. A tensor's
            value is not looked at: 0 gives NaN.

    Differentiable by both. The squared distance is formed from dot products about a mean of keys:
    its rounding error is that of the largest |q − mean|² / ℓ².
    """

    name = "exp_kernel"
    more_columns = 2

    def __init__(self, sigma: float | Tensor = 1.0, lengthscale: float | Tensor = 1.0) -> None:
        self.sigma = _scalar("sigma", sigma)
        self.lengthscale = _scalar("lengthscale", lengthscale)
        self._origin: Tensor | None = None

    def about(self, k: Tensor) -> "ExpKernel":
        """With the origin that suits all keys."""
        score = ExpKernel(self.sigma, self.lengthscale)
        score._origin = self._middle(k)
        return score

    def _middle(self, k: Tensor) -> Tensor:
        """The mean of every so many keys, `[H, d_k]`."""
        wide = torch.promote_types(k.dtype, torch.float32)
        some = k.detach()[:: k.shape[0] // _KEYS_OF_MIDDLE + 1].to(wide)
        return some.sum(0) / max(1, some.shape[0])

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """With two more columns: −|q|²/2 + log σ² and 1, 1 and −|k|²/2; in float32 or wider."""
        sigma, length = self.parameters(q)
        wide = sigma.dtype
        # Distances do not change with the origin, and are exact to more digits near it.
        origin = self._middle(k) if self._origin is None else self._origin
        q, k = (q.to(wide) - origin) / length, (k.to(wide) - origin) / length
        tiny = torch.finfo(wide).tiny
        own_q = torch.log(sigma.square().clamp_min(tiny)) - q.square().sum(2, keepdim=True) / 2
        own_k = -k.square().sum(2, keepdim=True) / 2
        one = torch.ones_like(own_k)
        return torch.cat([q, own_q, one], 2), torch.cat([k, one, own_k], 2)

    def parameters(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both, in float32 or wider."""
        wide = torch.promote_types(like.dtype, torch.float32)
        return (
            torch.as_tensor(self.sigma, dtype=wide, device=like.device),
            torch.as_tensor(self.lengthscale, dtype=wide, device=like.device),
        )

    def gradients(self, given: Pair, made: Pair, of_made: Pair) -> ScoreGradients:
        """Through both columns of a node's own."""
        d_k, dtype = given[0].shape[2], given[0].dtype
        sigma, length = self.parameters(given[0])
        dlength = torch.zeros_like(length)
        own_q, own_k = of_made[0][:, :, d_k : d_k + 1], of_made[1][:, :, d_k + 1 :]
        found = []
        for v, g, own in zip(made, of_made, (own_q, own_k), strict=True):
            v, g = v[:, :, :d_k], g[:, :, :d_k]
            g.addcmul_(v, own, value=-1.0)
            dlength -= (g * v).sum() / length
            found.append((g / length).to(dtype))
        dq, dk = found
        dsigma = 2 / sigma * own_q.sum()
        dsigma = dsigma.masked_fill(sigma.square() < torch.finfo(sigma.dtype).tiny, 0.0)
        return dq, dk, dsigma, dlength

    def weighting(self, d_k: int) -> Weighting:
        """`s = eᵘ`, of the dot product alone: scale 1."""
        return Weighting(scale=1.0, function="exp")


class GAT(AbstractScore):
    """`s_ij = LeakyReLU(q_i + k_j)` of `q`, `k` `[N, H, 1]`: a node's own halves of `aᵀ[Wx ‖ Wx]`.

    Args:
        negative_slope: of the LeakyReLU, a float.

    Reference: GRAND (Chamberlain et al. 2021), equation 13.
    """

    name = "gat"
    more_columns = 1

    def __init__(self, negative_slope: float = 0.2) -> None:
        check_float("GAT", "negative_slope", negative_slope)
        if not isfinite(negative_slope):
            got = str(negative_slope)
            raise ValueError(message("GAT", "negative_slope", "must be finite", got))
        self.negative_slope = float(negative_slope)

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """A sum as a dot product: [q, 1] and [1, k]."""
        one = torch.ones_like(q)
        return torch.cat([q, one], 2), torch.cat([one, k], 2)

    def prepare_edges(self, edge_key: Tensor) -> Tensor:
        """In the column that q multiplies by 1."""
        return torch.cat([torch.zeros_like(edge_key), edge_key], 2)

    def gradients(self, given: Pair, made: Pair, of_made: Pair) -> ScoreGradients:
        """Of the one column of each that is not constant."""
        return of_made[0][:, :, :1], of_made[1][:, :, 1:], None, None

    def weighting(self, d_k: int) -> Weighting:
        """`s = LeakyReLU(u)`, of the dot product alone: scale 1."""
        return Weighting(scale=1.0, function="leaky_relu", slope=self.negative_slope)


SCORES: dict[str, AbstractScore] = {
    score.name: score for score in (ScaledDot(), Cosine(), Pearson(), ExpKernel(), GAT())
}


def has_name(score: AbstractScore) -> bool:
    """Whether its class is one of `SCORES`, which the projected operator finds by name."""
    return type(SCORES.get(score.name)) is type(score)


def check_attention(
    op: str, score: Any, normalizer: Any, normalize: Any, d_k: int
) -> tuple[AbstractScore, Weighting]:
    """The score, by its name or as an object, and what the kernels are to compute of it."""
    if isinstance(score, str):
        check_choice(op, "score", score, known=tuple(SCORES))
        score = SCORES[score]
    elif not isinstance(score, AbstractScore):
        expected = f"must be one of {', '.join(SCORES)}, or an object such as ops.ExpKernel()"
        got = f"the class {score.__name__}" if isinstance(score, type) else type(score).__name__
        raise TypeError(message(op, "score", expected, got))
    check_choice(op, "normalizer", normalizer, known=NORMALIZERS)
    check_choice(op, "normalize", normalize, known=DIRECTIONS)
    if score.name == GAT.name and d_k != 1:
        name, letters = ("weight", "[2·H, d]") if op.startswith("projected") else ("q", "[N, H, 1]")
        remedy = "Project the halves of aᵀ[Wx_i ‖ Wx_j] first."
        expected = f"must have shape {letters} for score 'gat'"
        raise ValueError(message(op, name, expected, f"d_k = {d_k}", remedy))
    weighting = score.weighting(d_k)
    if normalizer != "softmax" or normalize != "receiver":
        weighting = replace(weighting, normalizer=normalizer, normalize=normalize)
    return score, weighting
