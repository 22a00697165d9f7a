"""A whole model as GRAND's released code runs it: its right-hand side under torchdiffeq."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torch.nn import functional

from bench.core.configurations import Configuration
from bench.core.problem import Shape
from bench.peers.released import PARAMETERS, gathered_product, released_edge_attention
from grand_fast import Graph
from grand_fast.nn import GRAND
from grand_fast.nn.attention_diffusion import AttentionDiffusion

# tol_scale times these, as in the released code.
RTOL, ATOL = 1e-9, 1e-7


@dataclass(frozen=True)
class Continuous:
    """The adjoint equations that the released code was tuned with, solved backwards."""

    method: str
    tol_scale: float


# Backward of the tuned configurations that are measured; Cora differentiates the solver's steps.
TUNED_ADJOINT: dict[str, Continuous | None] = {
    "Cora": None,
    "PubMed": Continuous("adaptive_heun", 16324.0),
    "CoauthorCS": Continuous("dopri5", 6599.0),
    "Computers": Continuous("dopri5", 444.0),
}


class ReleasedModel(nn.Module):
    """Encoder → torchdiffeq over the released right-hand side → ReLU → decoder.

    Args:
        model: of variant "l" or "nl"; its weights are copied, and its options taken.
        graph: its edges are kept in the data's order, loops last.
        adjoint: None differentiates the solver's steps, as torchdiffeq's odeint does.

    As there, the source is detached; and through the adjoint of GRAND-l neither queries nor keys
    get a gradient, nor is one computed: to its advantage. `nfe` counts the evaluations of f in the
    last forward pass, `nfe_backward` those since.
    """

    def __init__(self, model: GRAND, graph: Graph, adjoint: Continuous | None) -> None:
        super().__init__()
        assert isinstance(model.field, AttentionDiffusion)
        self.encoder, self.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
        self.field = _Field(model, graph)
        self.input_dropout, self.dropout = model.input_dropout, model.dropout
        self.solve: dict[str, Any] = {"method": model.method}
        if model.tol_scale is not None:
            self.solve |= {"rtol": RTOL * model.tol_scale, "atol": ATOL * model.tol_scale}
        elif model.rtol is not None:
            self.solve |= {"rtol": model.rtol, "atol": model.atol}
        else:
            self.solve["options"] = {"step_size": model.step_size}
        self.times = torch.tensor([0.0, model.T])
        self.adjoint = adjoint
        self.nfe = 0

    @property
    def nfe_backward(self) -> int:
        """Evaluations of f since the last forward pass ended."""
        return self.field.nfe - self.nfe

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """Logits; the edges are those given on construction."""
        x = self.encoder(functional.dropout(x, self.input_dropout, self.training))
        self.field.start(x)
        if self.adjoint is None:
            states = torchdiffeq.odeint(self.field, x, self.times, **self.solve)
        else:
            states = torchdiffeq.odeint_adjoint(
                self.field, x, self.times, **self.solve,
                adjoint_method=self.adjoint.method,
                adjoint_rtol=RTOL * self.adjoint.tol_scale,
                adjoint_atol=ATOL * self.adjoint.tol_scale,
                adjoint_params=tuple(self.field.solved_parameters()),
            )  # fmt: skip
        self.nfe = self.field.nfe
        x = functional.dropout(torch.relu(states[-1]), self.dropout, self.training)
        logits: Tensor = self.decoder(x)
        return logits


class _Field(nn.Module):
    """f of the released code; of GRAND-l with the attention at x(0)."""

    def __init__(self, model: GRAND, graph: Graph) -> None:
        super().__init__()
        self.layer = copy.deepcopy(model.field)
        layer, self.is_linear, self.nfe = self.layer, model.variant == "l", 0
        receiver, sender = graph.edge_index().flip(0)
        shape = Shape(layer.channels, layer.heads, layer.attention_channels)
        chosen = Configuration("", shape, layer.score, layer.normalizer, layer.normalize)
        self.attention = released_edge_attention(chosen, receiver, sender)
        self.product = gathered_product(receiver, sender)
        self.a: Tensor | None = None

    def start(self, x0: Tensor) -> None:
        """Begin a solve at this state."""
        self.nfe, self.x0 = 0, x0.detach()
        self.a = self.attention(x0, self._given()) if self.is_linear else None

    def solved_parameters(self) -> list[nn.Parameter]:
        """Those of which the adjoint equations get the gradient."""
        return list((self.layer.scale if self.is_linear else self.layer).parameters())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """`alpha (A x − x) + beta x0`."""
        self.nfe += 1
        a = self.attention(x, self._given()) if self.a is None else self.a
        f = self.layer.scale.alpha * (self.product(a, x) - x)
        beta = self.layer.scale.beta
        return f if beta is None else f + beta * self.x0

    def _given(self) -> dict[str, Tensor]:
        return {PARAMETERS[name]: p for name, p in self.layer.named_parameters()}
