"""`projected_attention_diffusion`: from the state to GRAND's vector field, projections included."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.kernels.csr import Add
from grand_fast.ops import _projected_attention as projected
from grand_fast.ops._autograd import Operator
from grand_fast.ops._input_types import autocast_inputs, promoted_edges
from grand_fast.ops.backends import Backend, choose
from grand_fast.ops.calls import Call, Planned, Resolved, apart_from_scale
from grand_fast.ops.checks import (
    channel_vector,
    check_add,
    check_graph,
    check_source,
    check_tensor,
    inner_contiguous,
    message,
)
from grand_fast.ops.edge_attention import check_edge_weight, to_slots
from grand_fast.ops.scores import SCORES, AbstractScore, check_attention, has_name

_OP = "projected_attention_diffusion"


@autocast_inputs
@promoted_edges("edge_weight")
def projected_attention_diffusion(
    x: Float[Tensor, "N d"],
    weight: Float[Tensor, "2*d_att d"],
    bias: Float[Tensor, " 2*d_att"],
    graph: Graph,
    *,
    heads: int,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor | None = None,
    x0: Float[Tensor, "N d"] | None = None,
    score: str | AbstractScore = "scaled_dot",
    normalizer: str = "softmax",
    normalize: str = "receiver",
    edge_weight: Float[Tensor, " E"] | None = None,
    add: Add = (),
    backend: Backend = "auto",
) -> Float[Tensor, "N d"]:
    """`attention_diffusion` with `q, k = x weightᵀ + bias`, as one operator.

    `f_i = alpha (mean_h Σ_j a^h_ij x_j − x_i) + beta x0_i`, with
    `a^h_i: = softmax_j(<q^h_i, k^h_j> / √d_k)` over the senders `j` of receiver `i`.

    Args:
        x: node state `[N, d]`.
        weight, bias: of the queries, then of the keys, `[2·d_att, d]` and `[2·d_att]`.
        graph: the edges.
        heads: `H`; must divide `d_att`.
        alpha, beta, x0, score, normalizer, normalize, edge_weight, add, backend: as in
            `attention_diffusion`.

    Returns:
        `f` `[N, d]`, in the dtype of `x`.

    Differentiable by `x`, `weight`, `bias`, `alpha`, `beta`, `x0`, each tensor of `add`,
    `edge_weight` and the parameters of `score`. Saves its inputs, `norm [N, 2, H]` and, while
    memory is plentiful, q and k.
    Reference: GRAND (Chamberlain et al. 2021), equations 2, 10 and 13.
    """
    call, parameters = _checked(
        x, weight, bias, graph, heads=heads, alpha=alpha, score=score, normalizer=normalizer,
        normalize=normalize, edge_weight=edge_weight, backend=backend,
    )  # fmt: skip
    beta, x0 = check_source(_OP, beta, x0, x)
    x_scale, scales, others = check_add(_OP, add, x)
    call = call._replace(x_scale=x_scale, scales=scales)
    return _operator(call, inner_contiguous(x), *parameters, beta, x0, *others)


def planned(
    x: Tensor, weight: Tensor, bias: Tensor, graph: Graph, **options: Any,
) -> Planned:  # fmt: skip
    """The operator for many states like `x`, with the same `weight`, `bias`, `graph` and `options`:
    `heads`, `alpha`, `score`, `normalizer`, `normalize` and `edge_weight`, all given."""
    alpha, factor = apart_from_scale(options.pop("alpha"))
    call, parameters = _checked(x, weight, bias, graph, alpha=alpha, **options)
    project = projected.packed_projection(weight, bias, call.backend)
    call = call._replace(resolved=Resolved(projected.OPERATOR, call.backend, graph, project))
    return Planned(_operator, call, parameters, x, factor)


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    graph: Graph,
    *,
    heads: int,
    alpha: float | Tensor,
    score: str | AbstractScore,
    normalizer: str,
    normalize: str,
    edge_weight: Tensor | None,
    backend: Backend = "auto",
) -> tuple[Call, tuple[Tensor | None, ...]]:
    """What does not depend on the state: how to run it, and the tensors after `x`."""
    check_graph(_OP, graph)
    check_tensor(_OP, "x", x, letters="[N, d]", sizes=(graph.num_nodes, None), graph=graph)
    sizes = (None, x.shape[1])
    check_tensor(_OP, "weight", weight, letters="[2·d_att, d]", sizes=sizes, like=x)
    check_tensor(_OP, "bias", bias, letters="[2·d_att]", sizes=(weight.shape[0],), like=x)
    if not isinstance(heads, int):
        raise TypeError(message(_OP, "heads", "must be an int", type(heads).__name__))
    if heads < 1 or weight.shape[0] % (2 * heads):
        got = f"{heads} for 2·d_att = {weight.shape[0]}"
        raise ValueError(message(_OP, "heads", "must divide d_att", got))
    d_k = weight.shape[0] // (2 * heads)
    score_object, weighting = check_attention(_OP, score, normalizer, normalize, d_k)
    if not has_name(score_object):
        expected, got = f"must be one of {', '.join(SCORES)}", type(score_object).__name__
        remedy = "Project q and k, and call attention_diffusion, which takes any."
        raise TypeError(message(_OP, "score", expected, got, remedy))
    check_edge_weight(_OP, edge_weight, graph, x)
    alpha = channel_vector(_OP, "alpha", alpha, x)
    name = choose(_OP, backend, x)
    w = None if edge_weight is None else to_slots(edge_weight, graph)
    call = Call(graph, name, weighting, heads, score_object.name)
    return call, (weight, bias, alpha, w, *score_object.parameters(x))


_operator = Operator(
    _OP,
    inputs=("x", "weight", "bias", "alpha", "edge_weight?", "sigma?", "lengthscale?"),
    options=("weighting", "heads", "score", "x_scale", "scales"),
    has_source=True,
    saves=1,  # norm; a compiled program projects again in backward rather than hold q and k
    forward=projected.forward,
    backward=projected.backward,
    reference=projected.reference,
    fake=projected.fake,
)
