"""`GRANDConv`: one diffusion as a layer of a PyG network."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.nn._given import check_state, graph_of
from grand_fast.nn._solve import AbstractDiffusion
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.nn.encoder import check_sizes
from grand_fast.ops.scores import AbstractScore
from grand_fast.solvers import Adjoint, Method
from grand_fast.solvers.regularizers import Regularizer
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.tolerances import Convention

VARIANTS = ("l", "nl")


class GRANDConv(AbstractDiffusion):
    """Graph neural diffusion of node features to time `T`, as a layer in PyG's conventions.

    `x(0) = x`, `dx/dt = alpha (A(x) x − x) + beta x(0)`, and x(T) comes out

    Args:
        channels: `d`, of the input and of the output; all else goes by keyword.
        heads, attention_channels: `H` and `H · d_k` (by default `channels`).
        variant: `"nl"` attention from each `x(t)`, `"l"` attention from `x(0)`, constant in time.
        score, normalizer, normalize, mix_features, constant_init, alpha, source, per_channel: as in
            `AttentionDiffusion`; the source is the input.
        T, method, step_size, rtol, atol, tol_scale, tol_convention, adjoint, memory_limit, max_nfe:
            as in `grand_fast.integrate`; `T` in units of diffusion time. `step_size` does nothing
            where the method chooses its steps.
        tol_scale_adjoint, adjoint_method: tolerances and method of adjoint `"continuous"`; by
            default those of the forward solve.
        regularizers: as in `grand_fast.integrate`, while training.

    No self-loops are added: a node that receives nothing decays to 0, or to its source.
    `.stats`, `.status`, `.t`, `.failure`, `.nfe_backward` and `.penalties` tell of the last solve,
    as those of `GRAND` do; a failed one raises nothing.
    Reference: GRAND (Chamberlain et al. 2021), section 4.
    """

    gamma = None

    def __init__(
        self,
        channels: int,
        *further: object,
        heads: int = 1,
        attention_channels: int | None = None,
        variant: str = "nl",
        score: str | AbstractScore = "scaled_dot",
        normalizer: str = "softmax",
        normalize: str = "receiver",
        mix_features: bool = False,
        constant_init: bool = False,
        alpha: float | Literal["learned"] = "learned",
        source: bool = False,
        per_channel: bool = False,
        T: float = 1.0,
        method: Method | AbstractSolver = "rk4",
        step_size: float | None = 1.0,
        rtol: float | None = None,
        atol: float | None = None,
        tol_scale: float | None = None,
        tol_convention: Convention = "released",
        adjoint: Adjoint = "checkpoint",
        tol_scale_adjoint: float | None = None,
        adjoint_method: Method | AbstractSolver | None = None,
        memory_limit: int | None = None,
        max_nfe: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        super().__init__()
        if further:
            raise TypeError(
                f"GRANDConv: `channels` must be the only positional argument, got "
                f"{1 + len(further)}. Its output has the channels of its input: write "
                "GRANDConv(channels, heads=…, attention_channels=…)."
            )
        check_sizes("GRANDConv", low=1, channels=channels)
        if variant not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"GRANDConv: `variant` must be one of {known}, got {variant!r}.")
        self.in_channels = self.out_channels = channels
        self.variant = variant
        self.T, self.method, self.step_size = T, method, step_size
        self.rtol, self.atol = rtol, atol
        self.tol_scale, self.tol_convention = tol_scale, tol_convention
        self.adjoint, self.memory_limit, self.max_nfe = adjoint, memory_limit, max_nfe
        self.tol_scale_adjoint, self.adjoint_method = tol_scale_adjoint, adjoint_method
        self.regularizers = regularizers
        self.field = AttentionDiffusion(
            channels,
            attention_channels,
            heads,
            score=score,
            normalizer=normalizer,
            normalize=normalize,
            reweight=True,
            mix_features=mix_features,
            constant_init=constant_init,
            alpha=alpha,
            source=source,
            per_channel=per_channel,
        )

    def reset_parameters(self) -> None:
        """Start again from random weights."""
        self.field.reset_parameters()

    def _like(self) -> Tensor | None:
        assert isinstance(self.field, AttentionDiffusion)
        return self.field.plain_weight()

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
        check_state("GRANDConv", x, "[N, channels]", like=self._like())
        graph = graph_of("GRANDConv", edge_index, x.shape[0])
        if edge_weight is not None:
            graph = graph.with_edge_weight(edge_weight)
        return self._diffuse(x, graph)
