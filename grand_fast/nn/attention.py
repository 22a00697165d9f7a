"""`Attention`: what an attention is, declared once for layers, models and the command line."""

from dataclasses import dataclass
from functools import partial

from grand_fast.ops.scores import DIRECTIONS, NORMALIZERS, SCORES, AbstractScore
from grand_fast.solvers.options import option

_option = partial(option, group="model")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How the weights of the edges follow from the state of the nodes.

    `AttentionDiffusion`, `GRAND` and `GRANDConv` take it whole, as `attention=Attention(…)`, or its
    fields by keyword, which win over those of a whole one.

    Args:
        heads: `H`; must divide `attention_channels`.
        attention_channels: `H · d_k`; None: as many as a layer's `channels`, a model's
            `hidden_channels`.
        score: a name as in `ops.edge_attention`; `"exp_kernel"` then learns σ and ℓ, which start
            at 1. Or an object, `ops.ExpKernel(…)`, `ops.GAT(…)`, whose values stay as they are.
        normalizer, normalize: as in `ops.edge_attention`.
        reweight: multiply the scores by the edge weights of the graph, where it has any.
        mix_features: heads carry values of their own,
            `f = alpha (W_out mean_h A^h W_V^h x − x) + beta x0`.
        constant_init: start with all weights of queries and keys at 1e-5, so with an attention that
            is nearly the same on all edges of a row. Not with `"gat"`, which has neither.
    """

    heads: int = _option(1, "attention heads", low=1)
    attention_channels: int | None = _option(None, "of all heads together", low=1)
    score: str | AbstractScore = _option(
        "scaled_dot", "of an edge, from query and key", choices=tuple(SCORES)
    )
    normalizer: str = _option("softmax", "of the scores", choices=NORMALIZERS)
    normalize: str = _option("receiver", "whose edges weigh 1 together", choices=DIRECTIONS)
    reweight: bool = _option(False, "multiply the scores by the edge weights")
    mix_features: bool = False
    constant_init: bool = _option(False, "queries and keys start from equal weights")
