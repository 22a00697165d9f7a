"""Attention whose heads carry values of their own: `mean_h A^h v^h`."""

from collections.abc import Sequence

from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.ops._autocast import autocast_inputs
from grand_fast.ops.attention_diffusion import prepared_diffusion
from grand_fast.ops.backends import choose
from grand_fast.ops.checks import channel_vector
from grand_fast.ops.edge_attention import edge_inputs
from grand_fast.ops.scores import AbstractScore, check_attention

_OP = "attention_diffusion"


@autocast_inputs
def mixed_values(
    values: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    graph: Graph,
    *,
    score: str | AbstractScore,
    normalizer: str,
    normalize: str,
    edge_weight: Tensor | None,
) -> Tensor:
    """`mean_h A^h v^h` `[N, d_v]` of `H` tensors `v^h` `[N, d_v]`; the rest as `edge_attention`.

    A call of the diffusion kernels for each head, with `v^h` as its state and added again:
    `(A^h v^h − v^h + v^h) / H`, on top of the heads before. Nothing of size `E` is stored.
    """
    score_object, weighting = check_attention(_OP, score, normalizer, normalize, q.shape[2])
    name = choose(_OP, "auto", values[0])
    q, k = score_object.prepare(q, k)
    w, top = edge_inputs(q, k, edge_weight, weighting=weighting, graph=graph, name=name)
    share = 1 / len(values)
    before: tuple[tuple[float, ...], list[Tensor]] = ((), [])
    for v, q_h, k_h in zip(values, q.unbind(1), k.unbind(1), strict=True):
        mixed = prepared_diffusion(
            v,
            q_h.unsqueeze(1),
            k_h.unsqueeze(1),
            graph,
            weighting=weighting,
            edge_weight=w,
            top=top,
            alpha=channel_vector(_OP, "alpha", share, v),
            add=(share, *before),
            name=name,
        )
        before = ((1.0,), [mixed])
    return mixed
