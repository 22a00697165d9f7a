"""`GRAND`: encoder → diffusion → decoder."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from grand_fast.graph import Graph
from grand_fast.nn._given import check_state, graph_of
from grand_fast.nn._layers import DiffusionScale, is_plain, reset
from grand_fast.nn._solve import AbstractDiffusion
from grand_fast.nn._thinning import check_thinning, thinned
from grand_fast.nn.attention import Attention
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.nn.encoder import (
    MLP,
    check_labels,
    check_no_decoder,
    check_sizes,
    relu_dropout,
    sparse_linear,
)
from grand_fast.ops.checks import check_choice
from grand_fast.solvers import Solve
from grand_fast.solvers.options import gathered, refuse, takes

VARIANTS = ("l", "nl", "nl-rw", "laplacian", "mixed")
LAPLACIANS = ("random_walk", "symmetric")


@takes(Attention, Solve)
class GRAND(AbstractDiffusion):
    """Graph neural diffusion for node classification.

    `x(0) = encoder(input)`, `dx/dt = f(x)` up to `T`, `logits = decoder(relu(x(T)))`

    Args:
        in_channels, hidden_channels, out_channels: of the input, of the state, classes. The state
            has `d = hidden_channels + label_channels + augment` channels.
        variant: `"l"` attention from `x(0)`, constant in time; `"nl"` attention from each `x(t)`;
            `"nl-rw"` the same on the edges that `attention_threshold` or `attention_quantile`
            keeps; `"laplacian"` no attention: weights from the graph's edge weights; `"mixed"`
            `(1 − σ(γ))` times the attention from `x(0)` plus `σ(γ)` times those weights, γ learned
            from 0.
        laplacian: of the last two, `"random_walk"` or `"symmetric"`, as `Graph` computes them.
        attention: as in `AttentionDiffusion`; else, or in place of its own, by keyword:
        {Attention}: as in `Attention`, `attention_channels` by default `hidden_channels`.
        attention_threshold: ρ: each forward pass keeps the edges with `a_ij > ρ`, `a` the mean over
            the heads of the attention at `x(0)`; the attention on them is then normalised anew, and
            trained. A node that keeps no edge decays to 0. Of variants `"l"` and `"nl-rw"`.
        attention_quantile: instead, of the same variants: in training, the edges whose `a_ij` is
            above that quantile (in [0, 1)) over all edges are kept; in evaluation all are.
        solve: how the diffusion is integrated; else, or in place of its own, by keyword:
        {Solve}: as in `grand_fast.Solve`.
        dropout, input_dropout: before the decoder and between the layers of the encoder; before
            the encoder.
        alpha, source, per_channel: as in `AttentionDiffusion`; the source `x0` is `x(0)`.
        encoder_channels: a hidden layer of that many in the encoder: linear, ReLU, dropout, linear,
            from Glorot and Bengio's (2010) weights.
        mlp: two more linear layers in the encoder, with residual connections.
        label_channels: channels of known labels, appended to the encoded input.
        batch_norm: normalise what is encoded, labels included, over the nodes.
        augment: channels of zeros appended to `x(0)`; the decoder does not see them.
        fc_out: a linear layer more before the decoder.
        degree_scaling: the diffused state is `D^{-1/2}` times what is encoded and is multiplied by
            `D^{1/2}` before the decoder, `D` the number of edges that end in each node. To the
            decoder this is a diffusion by `D^{1/2} A D^{-1/2}`: with equal attention by receiver,
            the symmetric normalisation of GCN (Kipf and Welling 2017).
        decoder: False leaves it out: the encoder predicts and the diffusion propagates, so that the
            logits are the state itself, of `hidden_channels = out_channels`.

    After a forward pass `.stats` holds the solver's work, `.status` whether it succeeded, `.t` the
    time it reached, `.failure` what to try; after backward, `.nfe_backward` the evaluations there.
    A failed solve raises nothing: the logits are then those of the state it reached. After a pass
    in training `.penalties` holds the regularisers by node, `[N]` each, to add their means to the
    loss.
    Reference: GRAND (Chamberlain et al. 2021), section 4, equation 12 (`"nl-rw"`); augmentation:
    Dupont et al. 2019; without a decoder: Klicpera et al. 2019, "Predict then Propagate".
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        variant: str = "nl",
        laplacian: str = "random_walk",
        attention: Attention | None = None,
        solve: Solve | None = None,
        attention_threshold: float | None = None,
        attention_quantile: float | None = None,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        alpha: float | Literal["learned"] = "learned",
        source: bool = False,
        per_channel: bool = False,
        encoder_channels: int | None = None,
        mlp: bool = False,
        label_channels: int = 0,
        batch_norm: bool = False,
        augment: int = 0,
        fc_out: bool = False,
        degree_scaling: bool = False,
        decoder: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.solve = gathered("GRAND", Solve, solve, options)
        attention = gathered("GRAND", Attention, attention, options)
        refuse("GRAND", options, GRAND)
        check_choice("GRAND", "variant", variant, known=VARIANTS)
        check_choice("GRAND", "laplacian", laplacian, known=LAPLACIANS)
        if variant == "mixed" and attention.mix_features:
            raise ValueError(
                "GRAND: `mix_features` must be False with variant 'mixed', got True: the Laplacian "
                "has one matrix for all channels."
            )
        check_thinning(variant, attention_threshold, attention_quantile)
        check_sizes("GRAND", label_channels=label_channels, augment=augment)
        if encoder_channels is not None:
            check_sizes("GRAND", encoder_channels=encoder_channels, low=1)
        if not decoder:
            check_no_decoder("GRAND", hidden_channels, out_channels, fc_out)
        self.variant, self.laplacian = variant, laplacian
        self.attention_threshold = attention_threshold
        self.attention_quantile = attention_quantile
        self.dropout, self.input_dropout = dropout, input_dropout
        self.label_channels, self.augment = label_channels, augment
        self.degree_scaling = degree_scaling

        first = hidden_channels if encoder_channels is None else encoder_channels
        self.encoder = nn.Linear(in_channels, first)
        self.hidden = None if encoder_channels is None else nn.Linear(first, hidden_channels)
        self.mlp = MLP(hidden_channels, dropout=dropout) if mlp else None
        encoded = hidden_channels + label_channels
        self.batch_norm = nn.BatchNorm1d(encoded) if batch_norm else None
        channels = encoded + augment
        if variant == "laplacian":
            self.field = DiffusionScale(
                alpha, source=source, channels=channels if per_channel else None
            )
        else:
            if attention.attention_channels is None:
                attention = replace(attention, attention_channels=hidden_channels)
            self.field = AttentionDiffusion(
                channels, attention=attention, alpha=alpha, source=source, per_channel=per_channel
            )
        self.gamma = nn.Parameter(torch.zeros(())) if variant == "mixed" else None
        self.fc = nn.Linear(encoded, encoded) if fc_out else None
        self.decoder = nn.Linear(encoded, out_channels) if decoder else None
        self.out_channels = out_channels
        self._glorot()

    def reset_parameters(self) -> None:
        """Start again from random weights, and γ from 0."""
        for module in self.children():
            reset(module)
        if self.gamma is not None:
            nn.init.zeros_(self.gamma)
        self._glorot()

    def _glorot(self) -> None:
        if self.hidden is not None:
            for layer in (self.encoder, self.hidden):
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, graph_or_edge_index: Graph | Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Logits `[N, out_channels]` of the nodes with input `x [N, in_channels]`.

        `x` is dense or `torch.sparse_csr`: then input dropout, encoder and its gradients read and
        keep the stored values alone, and `x` has no gradient. A model trained with one takes the
        other. An encoder that is no plain `nn.Linear`, or has hooks or parametrisations, is called
        with dense features.

        A `Graph` is used as it is. An `edge_index` (source to target) is sorted once and kept as
        long as that tensor lives and holds the same edges, as in `GRANDConv`; it gets no
        self-loops. `labels [N, label_channels]` holds the classes that may be known, one-hot, and
        zeros in the rows of all other nodes: a model that is given the labels it is trained on
        learns to read them off.
        """
        x, graph, scale = self._start(x, graph_or_edge_index, labels)
        return self._decode(self._diffuse(x, graph), scale)

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, graph_or_edge_index: Graph | Tensor, T: float, labels: Tensor | None = None
    ) -> list[tuple[float, Tensor]]:
        """Times and logits at 0 and after each step that counts, to `T`, without gradients.

        Past `self.T` the diffusion goes on from there, so that the logits at `self.T` are those of
        `forward`, bit for bit. Where the solve fails the list ends; `.status` and `.stats` are
        those of the solve to `self.T`.

        Args:
            x, graph_or_edge_index, labels: as in `forward`.
            T: end time, at least 0, in units of diffusion time.
        """
        found: list[tuple[float, Tensor]] = []
        x, graph, scale = self._start(x, graph_or_edge_index, labels)
        self._observe(x, graph, T, lambda t, state: found.append((t, self._decode(state, scale))))
        return found

    def _start(
        self, x: Tensor, graph_or_edge_index: Graph | Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Graph, Tensor | None]:
        """`x(0) [N, d]`, the graph it diffuses over, and what it was divided by, `[N, 1]`."""
        channels = self.encoder.in_features if is_plain(self.encoder) else None
        is_linear = isinstance(self.encoder, nn.Linear)  # or any module, which takes what it takes
        check_state("GRAND", x, "[N, in_channels]", channels, any_shape=not is_linear)
        graph = graph_of("GRAND", graph_or_edge_index, x.shape[0])
        check_labels("GRAND", labels, x, self.label_channels)
        if x.layout is torch.strided:
            x = self.encoder(functional.dropout(x, self.input_dropout, self.training))
        else:
            x = sparse_linear(x, self.encoder, dropout=self.input_dropout, training=self.training)
        if self.hidden is not None:
            x = self.hidden(relu_dropout(x, self.dropout, training=self.training))
        if self.mlp is not None:
            x = self.mlp(x)
        if labels is not None:
            x = torch.cat([x, labels.to(x.dtype)], dim=1)
        if self.batch_norm is not None:
            x = self.batch_norm(x)
        if self.augment:
            x = functional.pad(x, (0, self.augment))
        scale = None
        if self.degree_scaling:
            scale = graph.rowptr.diff().clamp(min=1).to(x.dtype).sqrt()[:, None]
            x = x / scale
        quantile = self.attention_quantile if self.training else None
        if self.attention_threshold is not None or quantile is not None:
            assert isinstance(self.field, AttentionDiffusion)
            graph = thinned(
                self.field, x, graph, threshold=self.attention_threshold, quantile=quantile
            )
        return x, graph, scale

    def _decode(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Logits of a state `[N, d]` that was divided by `scale`."""
        if scale is not None:
            x = x * scale
        if self.decoder is None:
            return x[:, : self.out_channels]
        if self.augment:
            x = x[:, : -self.augment]
        if self.fc is not None:
            x = self.fc(torch.relu(x))
        x = relu_dropout(x, self.dropout, training=self.training)
        logits: Tensor = self.decoder(x)
        return logits
