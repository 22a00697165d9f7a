"""`GATConv`: PyG's graph attention layer on one operator."""

from typing import Any

import torch
import torch_geometric.nn
from torch import Tensor
from torch.nn import Parameter
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.utils import add_self_loops, remove_self_loops

from grand_fast.nn._layers import is_silent
from grand_fast.nn.message_passing import attended, graph_for, is_whole
from grand_fast.ops import GAT
from grand_fast.ops.edge_attention import to_user


class GATConv(torch_geometric.nn.GATConv):  # type: ignore[misc]
    """PyG's `GATConv`, with its arguments, parameters and results, in memory of the nodes.

    `x'_i = Σ_j a_ij Θ x_j`, `a_i: = softmax_j(s_ij)` over the senders `j` of receiver `i`,
    `s_ij = LeakyReLU(<a_s, Θ x_j> + <a_t, Θ x_i> + <a_e, Θ_e e_ij>)`

    Args:
        in_channels, out_channels, heads, concat, negative_slope, dropout, add_self_loops, edge_dim,
            fill_value, bias, residual, kwargs: as in `torch_geometric.nn.GATConv`, whose
            `state_dict` is this one's, both ways.

    Messages are neither gathered nor stored, and self-loops are added once for a tensor of edges.
    What runs by PyG's code is the same as in `TransformerConv`; also `in_channels` in pairs and a
    `size`.
    Reference: Veličković et al. 2018, equations 3 to 6.
    """

    # PyG puts faster ones here, generated from these types, and back for `explain`
    # edge_updater_type: (alpha: OptPairTensor, edge_attr: OptTensor)
    # propagate_type: (x: OptPairTensor, alpha: Tensor)
    edge_updater, propagate = MessagePassing.edge_updater, MessagePassing.propagate

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        size: Any = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        """As PyG's: `[N, H·d]`, or with `concat=False` `[N, d]`, from `x [N, in_channels]`.

        Args:
            x: node features.
            edge_index: `[2, E]`, who sends and who receives.
            edge_attr: `[E, edge_dim]`, or `[E]` where that is 1.
            size: numbers of nodes of both sides.
            return_attention_weights: True: return also `(edge_index, weights)` of all edges.
        """
        wanted = bool(return_attention_weights)
        whole, graph = is_whole(self, wanted), None
        if size is None and self.lin is not None:
            graph = graph_for(
                self, x, edge_index, edge_attr, whole=whole, loops=self.add_self_loops
            )
        if graph is None:
            return super().forward(x, edge_index, edge_attr, size, return_attention_weights)
        # Before lin, as in PyG: lazy ones draw their weights in this order
        residual = None if self.res is None else self.res(x)
        values = self.lin(x).view(-1, self.heads, self.out_channels)
        ends = torch.cat([self.att_dst, self.att_src])
        q, k = torch.einsum("nhc,shc->snh", values, ends)[..., None]
        if self.lin_edge is None:
            edge_attr = None
        if self.add_self_loops and (wanted or edge_attr is not None):
            edge_index, edge_attr = add_self_loops(
                *remove_self_loops(edge_index, edge_attr), fill_value=self.fill_value,
                num_nodes=len(x),
            )  # fmt: skip
        y, _, weights = attended(
            self, values, q, k, graph=graph, score=GAT(self.negative_slope), whole=whole,
            edge_key=None if edge_attr is None else self._of_edges(edge_attr),
        )  # fmt: skip
        if residual is not None:
            y = y + residual
        if self.bias is not None:
            y = y + self.bias
        if not wanted or weights is None:
            return y
        return y, (edge_index, to_user(weights, graph))

    def _of_edges(self, edge_attr: Tensor) -> Tensor:
        """What the features of edges add to the scores, `[E, H, 1]`."""
        features = edge_attr[:, None] if edge_attr.dim() == 1 else edge_attr
        lin = self.lin_edge
        is_known = is_silent(lin, Linear.forward) and type(lin.weight) is Parameter
        if is_known and features.shape[1:] == (lin.in_channels,):
            # The sum over d first: nothing has H·d columns for each edge
            weight = lin.weight.view(self.heads, self.out_channels, -1)
            per_head = torch.einsum("hcd,shc->dh", weight, self.att_edge)
            return (features @ per_head)[..., None]
        projected = lin(features).view(-1, self.heads, self.out_channels)
        scores: Tensor = (projected * self.att_edge).sum(2, keepdim=True)
        return scores
