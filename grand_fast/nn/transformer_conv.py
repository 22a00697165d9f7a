"""`TransformerConv`: PyG's layer of a graph transformer on one operator."""

from typing import Any

import torch
import torch_geometric.nn
from torch import Tensor
from torch_geometric.nn import MessagePassing

from grand_fast.nn.message_passing import attended, graph_for, is_whole
from grand_fast.ops.edge_attention import to_user


class TransformerConv(torch_geometric.nn.TransformerConv):  # type: ignore[misc]
    """PyG's `TransformerConv`, with its arguments, parameters and results, in memory of the nodes.

    `x'_i = W₁ x_i + Σ_j a_ij (W₂ x_j + W₆ e_ij)`,
    `a_i: = softmax_j(<W₃ x_i, W₄ x_j + W₆ e_ij> / √d)` over the senders `j` of receiver `i`

    Args:
        in_channels, out_channels, heads, concat, beta, dropout, edge_dim, bias, root_weight,
            kwargs: as in `torch_geometric.nn.TransformerConv`, whose `state_dict` is this one's,
            both ways.

    Messages are neither gathered nor stored: a call keeps queries, keys and values `[N, H·d]`, and
    of the edges their own features alone. The edges are sorted once and kept as long as the tensor
    of them lives. What the operators do not cover runs by PyG's code, and a log says why, once:
    two sets of nodes, edges in forms other than int64 `[2, E]` or `torch.sparse_csr`, features of
    edges together with dropout in training or `return_attention_weights`, another `aggr`, hooks of
    message passing, `explain`, autocast, `torch.func` and, without a log, `torch.compile`. Results
    agree to rounding; with dropout they do from the same seed.
    Reference: Shi et al. 2021 (UniMP), equations 3 to 5.
    """

    # PyG puts a faster one here, generated from these types, and it back for `explain`
    # propagate_type: (query: Tensor, key: Tensor, value: Tensor, edge_attr: OptTensor)
    propagate = MessagePassing.propagate

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        """As PyG's: `[N, H·d]`, or with `concat=False` `[N, d]`, from `x [N, in_channels]`.

        Args:
            x: node features.
            edge_index: `[2, E]`, who sends and who receives.
            edge_attr: `[E, edge_dim]`.
            return_attention_weights: True or False: return also `(edge_index, weights [E, H])`.
        """
        wanted = isinstance(return_attention_weights, bool)
        whole = is_whole(self, wanted)
        graph = None
        if (edge_attr is None) == (self.lin_edge is None):
            graph = graph_for(self, x, edge_index, edge_attr, whole=whole)
        if graph is None:
            return super().forward(x, edge_index, edge_attr, return_attention_weights)
        shape = -1, self.heads, self.out_channels
        # In PyG's order, in which lazy ones draw their weights
        q, k, values = (
            lin(x).view(shape) for lin in (self.lin_query, self.lin_key, self.lin_value)
        )
        edges = None if edge_attr is None else self.lin_edge(edge_attr).view(shape)
        y, weights, _ = attended(
            self, values, q, k, graph=graph, score="scaled_dot", whole=whole, edge_key=edges,
            edge_value=edges,
        )  # fmt: skip
        if self.root_weight:
            root = self.lin_skip(x)
            if self.lin_beta is None:
                y = y + root
            else:
                gate = self.lin_beta(torch.cat([y, root, y - root], 1)).sigmoid()
                y = y.lerp(root, gate)
        if not wanted or weights is None:
            return y
        return y, (edge_index, to_user(weights, graph))
