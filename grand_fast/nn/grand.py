"""`GRAND`: encoder → diffusion → decoder."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from grand_fast.graph import Graph, cached_graph
from grand_fast.nn._scale import DiffusionScale
from grand_fast.nn._terms import LinearDiffusion, LinearMixing, NonlinearDiffusion
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.ops._scores import AbstractScore
from grand_fast.solvers import (
    AbstractTerm,
    Adjoint,
    ContinuousOptions,
    Method,
    Stats,
    Status,
    integrate,
)
from grand_fast.solvers._solution import Outcome
from grand_fast.solvers._solver import AbstractSolver
from grand_fast.solvers._tolerances import Convention
from grand_fast.solvers.regularizers import Regularizer

VARIANTS = ("l", "nl", "laplacian")
LAPLACIANS = ("random_walk", "symmetric")


class GRAND(nn.Module):
    """Graph neural diffusion for node classification.

    `x(0) = encoder(input)`, `dx/dt = f(x)` up to `T`, `logits = decoder(relu(x(T)))`

    Args:
        in_channels, hidden_channels, out_channels: of the input, of the state (`d`), classes.
        variant: `"l"` attention from `x(0)`, constant in time; `"nl"` attention from each `x(t)`;
            `"laplacian"` no attention: weights from the graph's edge weights.
        laplacian: of that variant, `"random_walk"` or `"symmetric"`, as `Graph` computes them.
        heads, attention_channels: `H` and `H · d_k` (by default `hidden_channels`).
        score, normalizer, normalize, reweight, mix_features: as in `AttentionDiffusion`.
        T, method, step_size, rtol, atol, tol_scale, tol_convention, adjoint, memory_limit, max_nfe:
            as in `grand_fast.integrate`; `T` in units of diffusion time. `step_size` does nothing
            where the method chooses its steps.
        tol_scale_adjoint, adjoint_method: tolerances and method of adjoint `"continuous"`; by
            default those of the forward solve.
        regularizers: as in `grand_fast.integrate`, while training.
        dropout, input_dropout: before the decoder, before the encoder.
        alpha, source, per_channel: as in `AttentionDiffusion`; the source `x0` is `x(0)`.

    After a forward pass `.stats` holds the solver's work, `.status` whether it succeeded, `.t` the
    time it reached, `.failure` what to try; after backward, `.nfe_backward` the evaluations there.
    A failed solve raises nothing: the logits are then those of the state it reached. After a pass
    in training `.penalties` holds the regularisers by node, `[N]` each, to add their means to the
    loss.
    Reference: GRAND (Chamberlain et al. 2021), section 4.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        variant: str = "nl",
        laplacian: str = "random_walk",
        heads: int = 1,
        attention_channels: int | None = None,
        score: str | AbstractScore = "scaled_dot",
        normalizer: str = "softmax",
        normalize: str = "receiver",
        reweight: bool = False,
        mix_features: bool = False,
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
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        alpha: float | Literal["learned"] = "learned",
        source: bool = False,
        per_channel: bool = False,
    ) -> None:
        super().__init__()
        if variant == "nl-rw":
            known = ", ".join(VARIANTS)
            raise NotImplementedError(
                f"GRAND: `variant` is supported for {known} in this version, got 'nl-rw'."
            )
        if variant not in VARIANTS:
            raise ValueError(
                f"GRAND: `variant` must be one of {', '.join(VARIANTS)}, got {variant!r}."
            )
        if laplacian not in LAPLACIANS:
            raise ValueError(
                f"GRAND: `laplacian` must be one of {', '.join(LAPLACIANS)}, got {laplacian!r}."
            )
        self.variant, self.laplacian = variant, laplacian
        self.T, self.method, self.step_size = T, method, step_size
        self.rtol, self.atol = rtol, atol
        self.tol_scale, self.tol_convention = tol_scale, tol_convention
        self.adjoint, self.memory_limit, self.max_nfe = adjoint, memory_limit, max_nfe
        self.tol_scale_adjoint, self.adjoint_method = tol_scale_adjoint, adjoint_method
        self.regularizers = regularizers
        self.dropout, self.input_dropout = dropout, input_dropout
        self.encoder = nn.Linear(in_channels, hidden_channels)
        self.field: AttentionDiffusion | DiffusionScale
        if variant == "laplacian":
            channels = hidden_channels if per_channel else None
            self.field = DiffusionScale(alpha, source=source, channels=channels)
        else:
            self.field = AttentionDiffusion(
                hidden_channels,
                attention_channels,
                heads,
                score=score,
                normalizer=normalizer,
                normalize=normalize,
                reweight=reweight,
                mix_features=mix_features,
                alpha=alpha,
                source=source,
                per_channel=per_channel,
            )
        self.decoder = nn.Linear(hidden_channels, out_channels)
        self.penalties: dict[str, Tensor] = {}
        self._outcome: Outcome | None = None  # of the last solve

    def reset_parameters(self) -> None:
        """Start again from random weights."""
        for module in (self.encoder, self.field, self.decoder):
            module.reset_parameters()

    def forward(self, x: Tensor, graph_or_edge_index: Graph | Tensor) -> Tensor:
        """Logits `[N, out_channels]` of the nodes with input `x [N, in_channels]`.

        A `Graph` is used as it is. An `edge_index` (source to target) is sorted once and kept as
        long as that tensor lives unchanged; it gets no self-loops.
        """
        graph = graph_or_edge_index
        if not isinstance(graph, Graph):
            graph = cached_graph(graph, x.shape[0])
        x = functional.dropout(x, self.input_dropout, self.training)
        x = self.encoder(x)
        solution = integrate(
            self._term(x, graph),
            x,
            self.T,
            method=self.method,
            step_size=self.step_size,
            rtol=self.rtol,
            atol=self.atol,
            tol_scale=self.tol_scale,
            tol_convention=self.tol_convention,
            adjoint=self.adjoint,
            adjoint_options=ContinuousOptions(
                method=self.adjoint_method,
                tol_scale=self.tol_scale_adjoint,
                tol_convention=self.tol_convention,
            ),
            memory_limit=self.memory_limit,
            max_nfe=self.max_nfe,
            regularizers=self.regularizers if self.training else (),
        )
        if not torch.compiler.is_exporting():  # a program keeps nothing between calls
            self._outcome, self.penalties = solution.outcome, solution.penalties
        x = functional.dropout(torch.relu(solution.x), self.dropout, self.training)
        logits: Tensor = self.decoder(x)
        return logits

    @property
    def stats(self) -> Stats | None:
        """Work of the last solve; None before the first."""
        return None if self._outcome is None else self._outcome.stats

    @property
    def status(self) -> Status | None:
        """How the last solve ended (reads one value from the device); None before the first."""
        return None if self._outcome is None else self._outcome.status

    @property
    def t(self) -> float | None:
        """Time that the last solve reached: `T`, or where it failed; None before the first."""
        return None if self._outcome is None else self._outcome.t

    @property
    def failure(self) -> str | None:
        """Status, time reached and what to try if the last solve failed; else None."""
        return None if self._outcome is None else self._outcome.failure

    @property
    def nfe_backward(self) -> int | None:
        """Evaluations of f in the backward pass of the last solve; None before the first."""
        return None if self._outcome is None else self._outcome.nfe_backward

    def _term(self, x0: Tensor, graph: Graph) -> AbstractTerm:
        field = self.field
        scale = field if isinstance(field, DiffusionScale) else field.scale
        source = None if scale.beta is None else x0
        if isinstance(field, AttentionDiffusion):
            if self.variant == "nl":
                return NonlinearDiffusion(field, graph, source)
            if field.mix_features:
                a = field.attention(x0, graph, mean_heads=False, edge_order="csr")
                return LinearMixing(field, a, graph, source)
            return NonlinearDiffusion(field, graph, source).freeze(0.0, x0)
        if self.laplacian == "symmetric":
            a = graph.symmetric_weights(x0.dtype, edge_order="csr")
        else:
            a = graph.random_walk_weights(x0.dtype, edge_order="csr")
        return LinearDiffusion(a, graph, alpha=scale.alpha, beta=scale.beta, x0=source)

    def extra_repr(self) -> str:
        """The solve, for `print(model)`."""
        return (
            f"variant={self.variant}, T={self.T}, method={self.method}, "
            f"step_size={self.step_size}, adjoint={self.adjoint}"
        )
