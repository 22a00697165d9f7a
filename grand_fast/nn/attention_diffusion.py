"""`AttentionDiffusion`: the parameters of the attention, alpha and beta → GRAND's vector field."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from grand_fast import ops
from grand_fast.graph import Graph
from grand_fast.nn._layers import DiffusionScale, is_plain, is_silent, joined, reset
from grand_fast.nn.attention import Attention
from grand_fast.nn.encoder import check_sizes
from grand_fast.ops.attention_diffusion import mixed_values
from grand_fast.ops.calls import Planned
from grand_fast.ops.checks import check_graph, check_tensor
from grand_fast.ops.edge_attention import EdgeOrder
from grand_fast.ops.projected_attention_diffusion import planned
from grand_fast.ops.scores import AbstractScore, check_attention, has_name
from grand_fast.solvers.options import gathered, refuse, shows, takes

Add = Sequence[tuple[float, Tensor]]
_NAME = "AttentionDiffusion"
_CONSTANT = 1e-5  # that of GRAND's released code


@shows(Attention, "options")
@takes(Attention)
class AttentionDiffusion(nn.Module):
    """GRAND's vector field with learned attention.

    `f_i = alpha (mean_h Σ_j a^h_ij x_j − x_i) + beta x0_i`, by default with
    `a^h_i: = softmax_j(<W_Q^h x_i, W_K^h x_j> / √d_k)`

    Args:
        channels: `d`, channels of the state.
        attention: how, as one `Attention`; else, or in place of its own, by keyword:
        {Attention.Args}
        alpha: `"learned"` is the sigmoid of a parameter that starts at 0; a float fixes it.
        source: add `beta x0` with a learned `beta` that starts at 0.
        per_channel: `alpha` and `beta`, where learned, are `[channels]` instead of scalars.

    `.query`, `.key` and, with `mix_features`, `.value` are `nn.Linear(channels,
    attention_channels)`, `.out` is `nn.Linear(d_k, channels)`. The score `"gat"` has `.shared`, W
    without a bias, and `.a_query`, `.a_key` `[H, d_k]` in place of the first two:
    `s^h_ij = LeakyReLU(<a_query^h, W^h x_i> + <a_key^h, W^h x_j>)`.

    Other modules with the same columns may take their places. While all are plain, one operator
    reads their weights; those that are something else, have hooks or parametrisations are called,
    once an evaluation of f.
    Reference: GRAND (Chamberlain et al. 2021), equations 2, 10 and 13.
    """

    def __init__(
        self,
        channels: int,
        attention_channels: int | None = None,
        heads: int | None = None,
        *,
        attention: Attention | None = None,
        alpha: float | Literal["learned"] = "learned",
        source: bool = False,
        per_channel: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = {"attention_channels": attention_channels, "heads": heads}
        options |= {name: size for name, size in sizes.items() if size is not None}
        attention = gathered(_NAME, Attention, attention, options)
        refuse(_NAME, options, AttentionDiffusion)
        heads, attention_channels = attention.heads, attention.attention_channels
        attention_channels = channels if attention_channels is None else attention_channels
        check_sizes(_NAME, low=1, channels=channels, attention_channels=attention_channels)
        check_sizes(_NAME, heads=heads)
        if heads < 1 or attention_channels % heads:
            raise ValueError(
                f"AttentionDiffusion: `heads` must divide attention_channels="
                f"{attention_channels}, got {heads}."
            )
        score, constant_init = attention.score, attention.constant_init
        of_score, _ = check_attention(_NAME, score, attention.normalizer, attention.normalize, 1)
        self.channels = int(channels)
        self.options = replace(
            attention, heads=int(heads), attention_channels=int(attention_channels)
        )
        d_k = attention_channels // heads
        self.is_gat = of_score.name == ops.GAT.name
        if constant_init and self.is_gat:
            raise ValueError(
                "AttentionDiffusion: `constant_init` must be False with score 'gat', got True: it "
                "has no queries and keys."
            )
        if self.is_gat:
            self.shared = nn.Linear(channels, attention_channels, bias=False)
            self.a_query = nn.Parameter(torch.empty(heads, d_k))
            self.a_key = nn.Parameter(torch.empty(heads, d_k))
        else:
            self.query = nn.Linear(channels, attention_channels)
            self.key = nn.Linear(channels, attention_channels)
        if score == ops.ExpKernel.name:
            self.sigma = nn.Parameter(torch.empty(1))
            self.lengthscale = nn.Parameter(torch.empty(1))
        if attention.mix_features:
            self.value = nn.Linear(channels, attention_channels)
            self.out = nn.Linear(d_k, channels)
        self.scale = DiffusionScale(
            alpha, source=source, channels=channels if per_channel else None
        )
        self._reset_own()

    def reset_parameters(self) -> None:
        """Start again as it was built: `σ = ℓ = 1`, `alpha = 1/2` if learned, `beta = 0`."""
        for module in self.children():
            reset(module)
        self._reset_own()

    def forward(
        self,
        x: Tensor,
        graph: Graph,
        x0: Tensor | None = None,
        *,
        scale: float = 1.0,
        add: Add = (),
        source: Tensor | Literal[False] | None = None,
    ) -> Tensor:
        """`scale · f + Σ c y`, `[N, channels]`, from the state `x [N, channels]`.

        `x0` is shaped like `x` and comes with `source=True` only; `source`, in its place, is
        `beta x0` as `.scale.source(x0)` gives it, or False: f without it. `add` holds the pairs
        `(c, y)`.
        """
        self._check("x", x, graph)
        if source is None:
            self._check_source(x0, graph)
        elif source is False:
            x0 = None
        else:
            self._check("source", source, graph)
            x0, add = None, [*add, (scale, source)]
        beta = None if x0 is None or self.scale.beta is None else scale * self.scale.beta
        if self.options.mix_features:
            q, k = self.query_key(x)
            mixed = mixed_values(self.values(x), q, k, graph, **self._weighting(x, graph))
            return self.field_of(mixed, x, x0, scale=scale, add=add)
        alpha = self.scale.alpha
        options = self._weighting(x, graph) | {
            "alpha": alpha if scale == 1.0 else scale * alpha,
            "beta": beta,
            "x0": x0,
            "add": add,
        }
        packed = self._packed()
        if packed is None:
            return ops.attention_diffusion(x, *self.query_key(x), graph, **options)
        heads = self.options.heads
        return ops.projected_attention_diffusion(x, *packed, graph, heads=heads, **options)

    def attention(
        self, x: Tensor, graph: Graph, *, mean_heads: bool = False, edge_order: EdgeOrder = "user"
    ) -> Tensor:
        """The weights `a [E, heads]` at state `x`; options as in `ops.edge_attention`."""
        self._check("x", x, graph)
        q, k = self.query_key(x)
        how = self._weighting(x, graph)
        return ops.edge_attention(q, k, graph, **how, mean_heads=mean_heads, edge_order=edge_order)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`q, k [N, heads, d_k]`, of plain layers two views of one product; of `"gat"` d_k = 1."""
        packed = self._packed()
        if packed is not None:
            q, k = functional.linear(x, *packed).chunk(2, dim=1)
        elif not self.is_gat:
            q, k = self.query(x), self.key(x)
        else:
            shared = self._split("shared", self.shared(x), x)
            q = torch.einsum("nhk,hk->nh", shared, self.a_query)
            k = torch.einsum("nhk,hk->nh", shared, self.a_key)
        return self._split("query", q, x), self._split("key", k, x)

    def _split(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """Heads of what a projection returns, `[N, heads, d_k]`."""
        n, heads = x.shape[0], self.options.heads
        if y.dim() != 2 or y.shape[0] != n or y.shape[1] % heads:
            raise ValueError(
                f"AttentionDiffusion: `{name}` must return [N, heads · d_k] = [{n}, {heads} · d_k],"
                f" got {list(y.shape)}."
            )
        return y.reshape(n, heads, y.shape[1] // heads)

    def values(self, x: Tensor) -> tuple[Tensor, ...]:
        """With `mix_features`: what each head carries, `heads` times `[N, d_k]`."""
        return self._split("value", self.value(x), x).unbind(1)

    def field_of(
        self, mixed: Tensor, x: Tensor, x0: Tensor | None, *, scale: float = 1.0, add: Add = ()
    ) -> Tensor:
        """With `mix_features`: `scale · f + Σ c y` from `mean_h A^h v^h`, `[N, d_k]`."""
        f = scale * self.scale.alpha * (self.out(mixed) - x)
        if self.scale.beta is not None and x0 is not None:
            f = f + scale * self.scale.beta * x0
        return ops.stage_update([*add, (1.0, f)]) if add else f

    def planned(self, x: Tensor, graph: Graph) -> Planned | None:
        """f without its source for the many states, like `x`, of a solve.

        None where that is not one operator: a projection, or this module, must be called.
        """
        if self.mix_features or not is_silent(self, AttentionDiffusion.forward):
            return None
        packed = self._packed()
        if packed is None:
            return None
        self._check("x", x, graph)
        how = self._weighting(x, graph) | {"alpha": self.scale.alpha, "heads": self.options.heads}
        return planned(x, *packed, graph, **how)

    def _packed(self) -> tuple[Tensor, Tensor] | None:
        if isinstance(self.options.score, AbstractScore) and not has_name(self.options.score):
            return None
        if self.is_gat:
            if not is_plain(self.shared) or self.shared.bias is not None:
                return None
            shared = self.shared.weight.view(self.options.heads, -1, self.channels)
            a = torch.stack([self.a_query, self.a_key])
            weight = torch.einsum("shk,hkd->shd", a, shared).flatten(0, 1)
            return weight, weight.new_zeros(weight.shape[0])
        if not is_plain(self.query) or not is_plain(self.key):
            return None
        return joined(self.query, self.key, names=("query", "key"))

    def plain_weight(self) -> Tensor | None:
        """The first projection's, which a state must be like; None where that is to be called."""
        first = self.shared if self.is_gat else self.query
        return first.weight if is_plain(first) else None

    def _weighting(self, x: Tensor, graph: Graph) -> dict[str, Any]:
        """What makes weights of queries and keys, as operators take it."""
        weight = graph.edge_weight if self.options.reweight else None
        score = self.options.score
        if score == ops.ExpKernel.name:
            score = ops.ExpKernel(self.sigma, self.lengthscale)
        return {
            "score": score,
            "normalizer": self.options.normalizer,
            "normalize": self.options.normalize,
            "edge_weight": None if weight is None else weight.to(x.dtype),
        }

    def _check(self, name: str, value: Tensor, graph: Graph) -> None:
        check_graph(_NAME, graph)
        # Of any dtype: autocast brings x and x0 to one.
        sizes = (graph.num_nodes, self.channels)
        check_tensor(_NAME, name, value, letters="[N, channels]", sizes=sizes, graph=graph)

    def _check_source(self, x0: Tensor | None, graph: Graph) -> None:
        if (self.scale.beta is None) != (x0 is None):
            expected = (
                "None without source=True" if self.scale.beta is None else "given: source=True"
            )
            raise ValueError(f"AttentionDiffusion: `x0` must be {expected}.")
        if x0 is not None:
            self._check("x0", x0, graph)

    def _reset_own(self) -> None:
        if self.options.constant_init:
            for layer in (self.query, self.key):
                if isinstance(layer, nn.Linear):
                    nn.init.constant_(layer.weight, _CONSTANT)
        if self.is_gat:
            nn.init.xavier_uniform_(self.a_query)
            nn.init.xavier_uniform_(self.a_key)
        if self.options.score == ops.ExpKernel.name:
            nn.init.ones_(self.sigma)
            nn.init.ones_(self.lengthscale)

    def extra_repr(self) -> str:
        """Sizes and choices, for `print(model)`."""
        heads, score, how = self.options.heads, self.options.score, self.options.normalizer
        score = score if isinstance(score, str) else score.name
        return f"heads={heads}, score={score}, normalizer={how}, normalize={self.options.normalize}"
