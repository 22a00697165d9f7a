"""`csr_diffusion`: diffusion with given edge weights."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from grand_fast.graph import Graph
from grand_fast.kernels._csr import Add
from grand_fast.ops._add import check_add, gradients, pairs
from grand_fast.ops._checks import (
    channel_vector,
    check_choice,
    check_graph,
    check_source,
    check_tensor,
    inner_contiguous,
)
from grand_fast.ops._dispatch import Backend, choose, launchers, plan
from grand_fast.ops._edge_order import EDGE_ORDERS, EdgeOrder, to_slots
from grand_fast.ops._source import source_gradients

_OP = "csr_diffusion"


def csr_diffusion(
    x: Float[Tensor, "N d"],
    a: Float[Tensor, " E"],
    graph: Graph,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor | None = None,
    x0: Float[Tensor, "N d"] | None = None,
    edge_order: EdgeOrder = "user",
    add: Add = (),
    backend: Backend = "auto",
) -> Float[Tensor, "N d"]:
    """The vector field of linear diffusion, with edge weights that are given.

    `f_i = alpha (Σ_j a_ij x_j − x_i) + beta x0_i`

    Args:
        x: node state `[N, d]`.
        a: edge weights `[E]`, dtype and device of `x`.
        graph: the edges; a node without edges gets `−alpha x_i + beta x0_i`.
        alpha: diffusivity scale, a float, or a tensor (scalar or `[d]`).
        beta, x0: source scale, like `alpha`, and source `[N, d]`; both or neither.
        edge_order: order of `a`: `"user"`, that of the edge index given to `Graph` (appended
            loops last), or `"csr"`, that of `graph.col`, which saves a permutation.
        add: pairs `(c, y)` of a float and a tensor `[N, d]`; `Σ c y` is added to `f` in the same
            pass, as the stages of a solver do.
        backend: `"auto"` goes by the device of `x`.

    Returns:
        `f` `[N, d]`, in the dtype of `x`.

    Differentiable by `x`, `a`, `alpha`, `beta`, `x0` and each `y`. Saves `x` and `a`.
    Reference: GRAND (Chamberlain et al. 2021), equation 2 with constant `A`.
    """
    check_graph(_OP, graph)
    check_tensor(_OP, "x", x, letters="[N, d]", sizes=(graph.num_nodes, None), graph=graph)
    remedy = "Did you mean its mean over heads, a.mean(1)?" if getattr(a, "ndim", 1) == 2 else ""
    check_tensor(_OP, "a", a, letters="[E]", sizes=(graph.num_edges,), like=x, remedy=remedy)
    check_choice(_OP, "edge_order", edge_order, known=EDGE_ORDERS)
    alpha = channel_vector(_OP, "alpha", alpha, x)
    beta, x0 = check_source(_OP, beta, x0, x)
    of_x, scales, others = check_add(_OP, add, x)
    name = choose(_OP, backend, x)
    if edge_order == "user":
        a = to_slots(a, graph)
    if name == "reference":
        f = launchers(_OP, name).csr_diffusion_fwd(
            x,
            a,
            alpha=alpha,
            beta=beta,
            x0=x0,
            add=pairs(x, of_x, scales, others),
            csr=graph.csr(),
        )
    else:
        f = _CsrDiffusionFunction.apply(x, a, alpha, beta, x0, graph, name, of_x, scales, *others)
    return f  # type: ignore[no-any-return]


class _CsrDiffusionFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        alpha: Tensor,
        beta: Tensor | None,
        x0: Tensor | None,
        graph: Graph,
        name: str,
        of_x: float,
        scales: tuple[float, ...],
        *others: Tensor,
    ) -> Tensor:
        x, a = inner_contiguous(x), a.contiguous()
        if x0 is not None:
            x0 = inner_contiguous(x0)
        add = pairs(x, of_x, scales, [inner_contiguous(y) for y in others])
        f: Tensor = launchers(_OP, name).csr_diffusion_fwd(
            x, a, alpha=alpha, beta=beta, x0=x0, add=add, csr=graph.csr(plan(name))
        )
        needs_beta = ctx.needs_input_grad[3]
        ctx.save_for_backward(x, a, alpha, beta, x0 if needs_beta else None)
        ctx.graph, ctx.name, ctx.of_x, ctx.scales = graph, name, of_x, scales
        return f

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, df: Tensor) -> tuple[Tensor | None, ...]:
        x, a, alpha, beta, x0 = ctx.saved_tensors
        needs_dx, needs_da, needs_dalpha, needs_dbeta, needs_dx0 = ctx.needs_input_grad[:5]
        df = inner_contiguous(df)
        dx = da = dalpha = None
        if needs_dx or needs_da or needs_dalpha:
            dx, da, dalpha = launchers(_OP, ctx.name).csr_diffusion_bwd(
                df,
                x,
                a,
                alpha=alpha,
                df_scale=ctx.of_x,
                csr=ctx.graph.csr(plan(ctx.name)),
                csr_t=ctx.graph.csr(plan(ctx.name), transposed=True),
                needs_dx=needs_dx,
                needs_da=needs_da,
                needs_dalpha=needs_dalpha,
            )
        dbeta, dx0 = source_gradients(df, beta, x0, needs_dbeta, needs_dx0)
        dothers = gradients(df, ctx.scales, ctx.needs_input_grad[9:])
        return dx, da, dalpha, dbeta, dx0, None, None, None, None, *dothers
