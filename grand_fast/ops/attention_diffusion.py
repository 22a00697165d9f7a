"""`attention_diffusion`: GRAND's vector field, edge attention and aggregation in one pass."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from grand_fast.graph import Graph
from grand_fast.kernels._csr import Add
from grand_fast.kernels._weighting import AttentionGradients, Weighting
from grand_fast.ops._add import check_add, gradients, pairs
from grand_fast.ops._checks import (
    channel_vector,
    check_graph,
    check_source,
    check_tensor,
    inner_contiguous,
)
from grand_fast.ops._dispatch import Backend, choose, launchers, plan
from grand_fast.ops._scores import AbstractScore, check_attention
from grand_fast.ops._source import source_gradients
from grand_fast.ops.edge_attention import check_edge_weight, check_query_key, edge_inputs

_OP = "attention_diffusion"


def attention_diffusion(
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    graph: Graph,
    *,
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
    """The vector field of GRAND: edge attention, softmax and diffusion, fused.

    `f_i = alpha (mean_h Σ_j a^h_ij x_j − x_i) + beta x0_i`, with
    `a^h_i: = softmax_j(<q^h_i, k^h_j> / √d_k)` over the senders `j` of receiver `i`.

    Args:
        x: node state `[N, d]`, shared by all heads.
        q, k: queries of receivers and keys of senders, `[N, H, d_k]`, dtype and device of `x`.
        graph: the edges; a node without edges gets `−alpha x_i + beta x0_i`.
        alpha: diffusivity scale, a float, or a tensor (scalar or `[d]`).
        beta, x0: source scale, like `alpha`, and source `[N, d]`; both or neither.
        score, normalizer, normalize, edge_weight: as in `edge_attention`.
        add: pairs `(c, y)` of a float and a tensor `[N, d]`; `Σ c y` is added to `f` in the same
            pass, as the stages of a solver do.
        backend: `"auto"` goes by the device of `x`.

    Returns:
        `f` `[N, d]`, in the dtype of `x`.

    Differentiable by `x`, `q`, `k`, `alpha`, `beta`, `x0`, each `y`, `edge_weight` and the
    parameters of `score`. Saves its inputs and `lse [N, H]`; nothing of size `E` is stored, the
    weights are recomputed in backward.
    Reference: GRAND (Chamberlain et al. 2021), equations 2, 10 and 13.
    """
    check_graph(_OP, graph)
    check_tensor(_OP, "x", x, letters="[N, d]", sizes=(graph.num_nodes, None), graph=graph)
    check_query_key(_OP, q, k, graph, like=x)
    of_score, weighting = check_attention(_OP, score, normalizer, normalize, q.shape[2])
    check_edge_weight(_OP, edge_weight, graph, x)
    alpha = channel_vector(_OP, "alpha", alpha, x)
    beta, x0 = check_source(_OP, beta, x0, x)
    of_x, scales, others = check_add(_OP, add, x)
    name = choose(_OP, backend, x)
    q, k = of_score.prepare(q, k)
    w, top = edge_inputs(q, k, edge_weight, weighting=weighting, graph=graph, name=name)
    return prepared_diffusion(
        x,
        q,
        k,
        graph,
        weighting=weighting,
        edge_weight=w,
        top=top,
        alpha=alpha,
        beta=beta,
        x0=x0,
        add=(of_x, scales, others),
        name=name,
    )


def prepared_diffusion(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    graph: Graph,
    *,
    weighting: Weighting,
    edge_weight: Tensor | None,
    top: Tensor | None,
    alpha: Tensor,
    beta: Tensor | None = None,
    x0: Tensor | None = None,
    add: tuple[float, tuple[float, ...], list[Tensor]],
    name: str,
) -> Tensor:
    """`attention_diffusion` from what the score made of q and k, all arguments checked.

    `edge_weight` in slot order; `alpha`, `beta` `[d]`; `add` as `check_add` returns it.
    """
    of_x, scales, others = add
    if name == "reference":
        f, _ = launchers(_OP, name).attention_diffusion_fwd(
            x,
            q,
            k,
            weighting=weighting,
            edge_weight=edge_weight,
            top=top,
            alpha=alpha,
            beta=beta,
            x0=x0,
            add=pairs(x, of_x, scales, others),
            csr=graph.csr(),
        )
    else:
        f = _AttentionDiffusionFunction.apply(
            x,
            q,
            k,
            alpha,
            beta,
            x0,
            edge_weight,
            top,
            weighting,
            graph,
            name,
            of_x,
            scales,
            *others,
        )
    return f  # type: ignore[no-any-return]


class _AttentionDiffusionFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        alpha: Tensor,
        beta: Tensor | None,
        x0: Tensor | None,
        edge_weight: Tensor | None,
        top: Tensor | None,
        weighting: Weighting,
        graph: Graph,
        name: str,
        of_x: float,
        scales: tuple[float, ...],
        *others: Tensor,
    ) -> Tensor:
        x, q, k = inner_contiguous(x), inner_contiguous(q), inner_contiguous(k)
        if x0 is not None:
            x0 = inner_contiguous(x0)
        add = pairs(x, of_x, scales, [inner_contiguous(y) for y in others])
        f, lse = launchers(_OP, name).attention_diffusion_fwd(
            x,
            q,
            k,
            weighting=weighting,
            edge_weight=edge_weight,
            top=top,
            alpha=alpha,
            beta=beta,
            x0=x0,
            add=add,
            csr=graph.csr(plan(name)),
            csr_t=graph.csr(plan(name), transposed=True),
        )
        needed_x0 = x0 if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(x, q, k, lse, alpha, beta, needed_x0, edge_weight, top)
        ctx.weighting, ctx.graph, ctx.name = weighting, graph, name
        ctx.of_x, ctx.scales = of_x, scales
        return f  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor | None, ...]:
        x, q, k, lse, alpha, beta, x0, edge_weight, top = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_dx, needs_dq, needs_dk, needs_dalpha, needs_dbeta, needs_dx0 = needs[:6]
        needs_dedge_weight, needs_dtop = needs[6:8]
        df = inner_contiguous(df)
        grads = AttentionGradients()
        needs_dqk = needs_dq or needs_dk or needs_dedge_weight or needs_dtop
        if needs_dx or needs_dqk or needs_dalpha:
            grads = launchers(_OP, ctx.name).attention_diffusion_bwd(
                df,
                x,
                q,
                k=k,
                weighting=ctx.weighting,
                edge_weight=edge_weight,
                top=top,
                lse=lse,
                alpha=alpha,
                df_scale=ctx.of_x,
                csr=ctx.graph.csr(plan(ctx.name)),
                csr_t=ctx.graph.csr(plan(ctx.name), transposed=True),
                needs_dqk=needs_dqk,
                needs_dalpha=needs_dalpha,
                needs_dedge_weight=needs_dedge_weight,
            )
        dbeta, dx0 = source_gradients(df, beta, x0, needs_dbeta, needs_dx0)
        dothers = gradients(df, ctx.scales, needs[13:])
        of_field = (grads.dx, grads.dq, grads.dk, grads.dalpha, dbeta, dx0)
        return (*of_field, grads.dedge_weight, grads.dtop) + (None,) * 5 + (*dothers,)
