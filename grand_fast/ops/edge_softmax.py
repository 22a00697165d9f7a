"""`edge_softmax`: scores of edges, normalised over the edges of each receiver or sender."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.kernels.weighting import Weighting
from grand_fast.ops._autograd import Gradients, Operator
from grand_fast.ops._input_types import autocast_inputs
from grand_fast.ops.backends import Backend, choose
from grand_fast.ops.calls import Call, Resolved
from grand_fast.ops.checks import check_choice, check_graph, check_tensor
from grand_fast.ops.edge_attention import EDGE_ORDERS, EdgeOrder, to_slots, to_user
from grand_fast.ops.scores import DIRECTIONS, NORMALIZERS

_OP = "edge_softmax"


@autocast_inputs
def edge_softmax(
    scores: Float[Tensor, " E"] | Float[Tensor, "E H"],
    graph: Graph,
    *,
    normalizer: str = "softmax",
    normalize: str = "receiver",
    edge_order: EdgeOrder = "user",
    backend: Backend = "auto",
) -> Float[Tensor, " E"] | Float[Tensor, "E H"]:
    """Weights of edges from their scores, which sum to 1 over the edges of each node.

    `a_ij = softmax_j(s_ij)` over the senders `j` of receiver `i`, by default

    Args:
        scores: `[E]`, or `[E, H]`, each head by itself.
        graph: the edges.
        normalizer: `"softmax"`, or `"squareplus"`: `p / Σ p` of `p = (v + √(v² + 4)) / 2`, with `v`
            the score less the largest of all edges and heads, through which gradients flow too.
        normalize: `"receiver"`: the weights of a receiver sum to 1; `"sender"`: those of a sender.
        edge_order: order of scores and weights: `"user"`, that of the edge index given to `Graph`
            (appended loops last), or `"csr"`, that of `graph.col`, which saves two permutations.
        backend: `"auto"` goes by the device of `scores`.

    Returns:
        `a`, of the shape and dtype of `scores`.

    Differentiable by `scores`. Saves them and `norm [N, 2, H]`, of which backward makes the weights
    again.
    Reference: GRAND (Chamberlain et al. 2021), equation 10.
    """
    check_graph(_OP, graph)
    by_head = getattr(scores, "ndim", 1) == 2
    sizes = (graph.num_edges, None) if by_head else (graph.num_edges,)
    letters = "[E, H]" if by_head else "[E]"
    remedy = "" if by_head else "Scores of H heads are [E, H]."
    check_tensor(_OP, "scores", scores, letters=letters, sizes=sizes, graph=graph, remedy=remedy)
    check_choice(_OP, "normalizer", normalizer, known=NORMALIZERS)
    check_choice(_OP, "normalize", normalize, known=DIRECTIONS)
    check_choice(_OP, "edge_order", edge_order, known=EDGE_ORDERS)
    name = choose(_OP, backend, scores)
    s = scores if by_head else scores[:, None]
    s = to_slots(s, graph) if edge_order == "user" else s.contiguous()
    weighting = Weighting(1.0, normalizer=normalizer, normalize=normalize)  # type: ignore[arg-type]
    a = _operator(
        Call(graph, name, weighting), s, _largest(s) if normalizer == "squareplus" else None
    )
    a = to_user(a, graph) if edge_order == "user" else a
    return a if by_head else a[:, 0]


def _largest(s: Tensor) -> Tensor:
    """The largest score of all, in float32 or wider; 0 without edges."""
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    return wide.amax() if s.numel() else wide.sum()


def _forward(call: Call, s: Tensor, top: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    on = call.on(_OP)
    a, norm = on.kernels.edge_softmax_fwd(s, top=top, **_groups(call, on))
    return a, (norm,)


def _backward(
    call: Call, da: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool
) -> Gradients:
    s, top = inputs
    on = call.on(_OP)
    grads: Gradients = on.kernels.edge_softmax_bwd(
        da, s, top=top, norm=saved[0], **_groups(call, on)
    )
    return grads


def _groups(call: Call, on: Resolved) -> dict[str, Any]:
    """What launchers take beside tables of edges; Aᵀ is planned only where it is needed."""
    weighting = call.weighting
    assert weighting is not None
    csr_t = on.csr_t if weighting.normalize == "sender" else None
    return {"weighting": weighting, "csr": on.csr, "csr_t": csr_t}


def _fake(call: Call, s: Tensor, top: Tensor | None) -> tuple[Tensor, ...]:
    wide = torch.promote_types(s.dtype, torch.float32)
    return s.new_empty(s.shape), s.new_empty([call.graph.num_nodes, 2, s.shape[1]], dtype=wide)


_operator = Operator(
    _OP, inputs=("s", "top?"), options=("weighting",), saves=1, forward=_forward,
    backward=_backward, fake=_fake,
)  # fmt: skip
