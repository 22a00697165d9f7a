"""`AttentionDiffusion`: the parameters of q, k, alpha and beta → GRAND's vector field."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from grand_fast import ops
from grand_fast.graph import Graph
from grand_fast.nn._scale import DiffusionScale


class AttentionDiffusion(nn.Module):
    """GRAND's vector field with learned attention.

    `f_i = alpha (mean_h Σ_j a^h_ij x_j − x_i) + beta x0_i`,
    `a^h_i: = softmax_j(<W_Q^h x_i, W_K^h x_j> / √d_k)`

    Args:
        channels: `d`, channels of the state.
        attention_channels: `H · d_k`; by default `channels`.
        heads: `H`; must divide `attention_channels`.
        score, normalizer, normalize: as in `grand_fast.ops.attention_diffusion`.
        alpha: `"learned"` is the sigmoid of a parameter that starts at 0; a float fixes it.
        source: add `beta x0` with a learned `beta` that starts at 0.

    Reference: GRAND (Chamberlain et al. 2021), equations 2 and 10.
    """

    def __init__(
        self,
        channels: int,
        attention_channels: int | None = None,
        heads: int = 1,
        *,
        score: str = "scaled_dot",
        normalizer: str = "softmax",
        normalize: str = "receiver",
        alpha: float | Literal["learned"] = "learned",
        source: bool = False,
    ) -> None:
        super().__init__()
        attention_channels = channels if attention_channels is None else attention_channels
        if heads < 1 or attention_channels % heads:
            raise ValueError(
                f"AttentionDiffusion: `heads` must divide attention_channels="
                f"{attention_channels}, got {heads}."
            )
        self.channels, self.attention_channels, self.heads = channels, attention_channels, heads
        self.score, self.normalizer, self.normalize = score, normalizer, normalize
        self.query = nn.Linear(channels, attention_channels)
        self.key = nn.Linear(channels, attention_channels)
        self.scale = DiffusionScale(alpha, source=source)

    def reset_parameters(self) -> None:
        """Start again: random projections, `alpha = 1/2` if learned, `beta = 0`."""
        for module in (self.query, self.key, self.scale):
            module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        graph: Graph,
        x0: Tensor | None = None,
        *,
        scale: float = 1.0,
        add: Sequence[tuple[float, Tensor]] = (),
    ) -> Tensor:
        """`scale · f + Σ c y`, `[N, channels]`, from the state `x [N, channels]`.

        `x0` is shaped like `x` and comes with `source` only; `add` holds the pairs `(c, y)`.
        """
        if (self.scale.beta is None) != (x0 is None):
            expected = (
                "None without source=True" if self.scale.beta is None else "given: source=True"
            )
            raise ValueError(f"AttentionDiffusion: `x0` must be {expected}.")
        weight, bias = self._packed()
        return ops.projected_attention_diffusion(
            x,
            weight,
            bias,
            graph,
            heads=self.heads,
            alpha=scale * self.scale.alpha,
            beta=None if self.scale.beta is None else scale * self.scale.beta,
            x0=x0,
            score=self.score,
            normalizer=self.normalizer,
            normalize=self.normalize,
            add=add,
        )

    def attention(self, x: Tensor, graph: Graph) -> Tensor:
        """The weights `a [E, heads]` at state `x`, in the user's edge order."""
        q, k = self.query_key(x)
        return ops.edge_attention(
            q,
            k,
            graph,
            score=self.score,
            normalizer=self.normalizer,
            normalize=self.normalize,
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`q, k [N, heads, d_k]`, two views of one product."""
        weight, bias = self._packed()
        qk = functional.linear(x, weight, bias).view(
            x.shape[0], 2, self.heads, self.attention_channels // self.heads
        )
        return qk[:, 0], qk[:, 1]

    def _packed(self) -> tuple[Tensor, Tensor]:
        """Both projections as one."""
        weight = torch.cat([self.query.weight, self.key.weight])
        return weight, torch.cat([self.query.bias, self.key.bias])

    def extra_repr(self) -> str:
        """Sizes and choices, for `print(model)`."""
        return f"heads={self.heads}, score={self.score}, normalizer={self.normalizer}"
