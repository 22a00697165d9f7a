"""GCN, GAT, GraphSAGE and MoNet from PyTorch Geometric, called as the training calls GRAND.

Sizes and rates are those of the papers that introduced GCN and GAT; the others take GCN's, with 64
hidden channels for all.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import GATConv, GCNConv, GMMConv, SAGEConv
from torch_geometric.utils import degree

from grand_fast.data.datasets import NodeData
from grand_fast.solvers import Solve, Stats
from grand_fast.training.presets import Preset

HIDDEN = 64
GAT_HEADS = 8
MONET_KERNELS = 3
PEERS = ("GCN", "GAT", "MoNet", "GS-mean", "GS-maxpool", "GCN-residual")
_RATES = {"GAT": {"lr": 0.005, "dropout": 0.6}}


def peer_preset(name: str, data: Preset) -> Preset:
    """The training of a peer on the data, features and split of `data`, by cross entropy alone."""
    ours = {key: getattr(data, key) for key in (
        "split", "component", "labels_per_class", "development", "row_normalize", "self_loops",
        "select",
    )}  # fmt: skip
    training = {"epochs": 200, "optimizer": "adam", "lr": 0.01, "weight_decay": 5e-4,
                "dropout": 0.5, "hidden": HIDDEN, "heads": 1}  # fmt: skip
    return replace(Preset(), **ours, **(training | _RATES.get(name, {})))


class Peer(nn.Module):
    """Convolutions with dropout before and a nonlinearity between them.

    Args:
        encoder: applied first, or None.
        convolutions: layers of PyG.
        arguments: of each after the features: the edge index, and what the layer wants of edges.
        dropout: before each convolution.
        activation: between them.
        residual: add a layer's input to its output where the two are equally wide.

    The other attributes are what the training reads from GRAND: no solve, no failure.
    """

    stats = Stats(nfe=0, accepted=0, rejected=0)
    failure: str | None = None
    nfe_backward = 0
    solve = Solve(T=0.0)

    def __init__(
        self,
        convolutions: list[nn.Module],
        arguments: tuple[Tensor, ...],
        *,
        encoder: nn.Module | None = None,
        dropout: float,
        activation: Callable[[Tensor], Tensor] = functional.relu,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.convolutions = nn.ModuleList(convolutions)
        self.arguments = arguments
        self.dropout, self.activation, self.residual = dropout, activation, residual

    def forward(self, x: Tensor, graph: object, labels: Tensor | None = None) -> Tensor:
        """Logits; the edges are those given on construction, whatever `graph` is."""
        if self.encoder is not None:
            x = self.encoder(functional.dropout(x, self.dropout, self.training))
        for index, convolution in enumerate(self.convolutions):
            y = functional.dropout(x, self.dropout, self.training)
            y = convolution(y, *self.arguments)
            if index == len(self.convolutions) - 1:
                return y
            y = self.activation(y)
            x = x + y if self.residual and x.shape == y.shape else y
        raise AssertionError("a peer has a layer")


def build(name: str, data: NodeData, preset: Preset, *, layers: int = 2) -> Peer:
    """The peer `name`, one of `PEERS`, with as many convolutions, on the edges of `data`."""
    hidden, drop, edges = preset.hidden, preset.dropout, data.edge_index
    widths = [data.x.shape[1], *[hidden] * (layers - 1), data.num_classes]
    if name in ("GCN", "GCN-residual"):
        # The normalised edges are the same in every epoch.
        chain = [GCNConv(a, b, cached=True) for a, b in pairwise(widths)]
        return Peer(chain, (edges,), dropout=drop, residual=name == "GCN-residual")
    if name == "GAT":
        head = hidden // GAT_HEADS
        chain = [GATConv(a, head, heads=GAT_HEADS, dropout=drop) for a in widths[:-2]]
        chain.append(GATConv(widths[-2], data.num_classes, heads=1, dropout=drop))
        return Peer(chain, (edges,), dropout=drop, activation=functional.elu)
    if name == "MoNet":
        chain = [GMMConv(a, b, dim=2, kernel_size=MONET_KERNELS) for a, b in pairwise(widths)]
        # pseudo-coordinates of citation graphs, [E, 2]: 1/√degree of both ends
        ends = degree(edges[0], data.num_nodes).clamp(min=1).rsqrt()
        return Peer(chain, (edges, ends[edges.T]), dropout=drop)
    if name in ("GS-mean", "GS-maxpool"):
        # A linear layer first: aggregating thousands of raw features takes gigabytes.
        pool = name == "GS-maxpool"
        chain = [SAGEConv(a, b, aggr="max" if pool else "mean", project=pool)
                 for a, b in pairwise([hidden, *widths[1:]])]  # fmt: skip
        return Peer(chain, (edges,), encoder=nn.Linear(widths[0], hidden), dropout=drop)
    raise ValueError(f"peer: must be one of {', '.join(PEERS)}, got {name!r}.")
