"""`GRANDConv`: one diffusion as a layer of a PyG network."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.nn._given import check_state, graph_of
from grand_fast.nn._solve import AbstractDiffusion
from grand_fast.nn.attention import Attention
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.nn.encoder import check_sizes
from grand_fast.ops.checks import check_choice
from grand_fast.solvers import Solve
from grand_fast.solvers.options import gathered, refuse, takes

VARIANTS = ("l", "nl")


@takes(Attention, Solve, without=("reweight",))
class GRANDConv(AbstractDiffusion):
    """Graph neural diffusion of node features to time `T`, as a layer in PyG's conventions.

    `x(0) = x`, `dx/dt = alpha (A(x) x − x) + beta x(0)`, and x(T) comes out

    Args:
        channels: `d`, of the input and of the output; all else goes by keyword.
        variant: `"nl"` attention from each `x(t)`, `"l"` attention from `x(0)`, constant in time.
        attention: as in `AttentionDiffusion`, `reweight` always on; else, or in place of its own:
        {Attention}: as in `Attention`.
        alpha, source, per_channel: as in `AttentionDiffusion`; the source is the input.
        solve: how it is integrated; else, or in place of its own:
        {Solve}: as in `grand_fast.Solve`.

    No self-loops are added: a node that receives nothing decays to 0, or to its source.
    `.stats`, `.status`, `.t`, `.failure`, `.nfe_backward` and `.penalties` tell of the last solve,
    as those of `GRAND` do; a failed one raises nothing.
    Reference: GRAND (Chamberlain et al. 2021), section 4.
    """

    field: AttentionDiffusion
    gamma = None

    def __init__(
        self,
        channels: int,
        *further: object,
        variant: str = "nl",
        attention: Attention | None = None,
        solve: Solve | None = None,
        alpha: float | Literal["learned"] = "learned",
        source: bool = False,
        per_channel: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if further:
            raise TypeError(
                f"GRANDConv: `channels` must be the only positional argument, got "
                f"{1 + len(further)}. Its output has the channels of its input: write "
                "GRANDConv(channels, heads=…, attention_channels=…)."
            )
        check_sizes("GRANDConv", low=1, channels=channels)
        check_choice("GRANDConv", "variant", variant, known=VARIANTS)
        self.in_channels = self.out_channels = channels
        self.variant = variant
        self.solve = gathered("GRANDConv", Solve, solve, options)
        always = {name: options.pop(name) for name in ("reweight",) if name in options}
        attention = gathered("GRANDConv", Attention, attention, options)
        refuse("GRANDConv", options | always, GRANDConv)
        self.field = AttentionDiffusion(
            channels,
            attention=replace(attention, reweight=True),
            alpha=alpha,
            source=source,
            per_channel=per_channel,
        )

    def reset_parameters(self) -> None:
        """Start again from random weights."""
        self.field.reset_parameters()

    def forward(
        self, x: Tensor, edge_index: Graph | Tensor, edge_weight: Tensor | None = None
    ) -> Tensor:
        """The state at `T`, `[N, channels]`, from `x [N, channels]`.

        Args:
            x: node features.
            edge_index: `[2, E]`, source to target; or a sparse adjacency, transposed as PyG's
                `adj_t`; or a `Graph`, as exported programs need one. It is sorted once and kept as
                long as that tensor lives and holds the same edges. Each call looks whether it
                does, in a pass over the ids, for which the host waits on a GPU; pass a `Graph`
                where that counts.
            edge_weight: `[E]`; multiplies the scores before they are normalised, in place of the
                weights that a sparse adjacency or a `Graph` carries, which have a gradient as well.

        One state has no two types of nodes: for those, `HeteroConv` with a layer for each relation
        within a type.
        """
        check_state("GRANDConv", x, "[N, channels]", like=self.field.plain_weight())
        graph = graph_of("GRANDConv", edge_index, x.shape[0])
        if edge_weight is not None:
            graph = graph.with_edge_weight(edge_weight)
        return self._diffuse(x, graph)
