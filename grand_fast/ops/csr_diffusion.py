"""`csr_diffusion`: diffusion with given edge weights."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.kernels.csr import Add
from grand_fast.ops._autograd import Gradients, Operator
from grand_fast.ops._input_types import autocast_inputs, promoted_edges
from grand_fast.ops.backends import Backend, choose
from grand_fast.ops.calls import Call, Planned, Resolved, apart_from_scale
from grand_fast.ops.checks import (
    channel_vector,
    check_add,
    check_choice,
    check_graph,
    check_source,
    check_tensor,
    inner_contiguous,
)
from grand_fast.ops.edge_attention import EDGE_ORDERS, EdgeOrder, to_slots

_OP = "csr_diffusion"


@autocast_inputs
@promoted_edges("a")
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
        a: edge weights `[E]`, on the device of `x`. If of another float type, all are promoted to
            that of `a * x`.
        graph: the edges; a node without edges gets `−alpha x_i + beta x0_i`.
        alpha: diffusivity scale, a float, or a tensor (scalar, `[d]` or `[1, d]`).
        beta, x0: source scale, like `alpha`, and source `[N, d]`; both or neither.
        edge_order: order of `a`: `"user"`, that of the edge index given to `Graph` (appended
            loops last), or `"csr"`, that of `graph.col`, which saves a permutation.
        add: pairs `(c, y)` of a float and a tensor `[N, d]`; `Σ c y` is added to `f` in the same
            pass, as the stages of a solver do.
        backend: `"auto"` goes by the device of `x`.

    Returns:
        `f` `[N, d]`, in the dtype of `a * x`; gradients in that of each input.

    Differentiable by `x`, `a`, `alpha`, `beta`, `x0` and each `y`. Saves `x` and `a`.
    Reference: GRAND (Chamberlain et al. 2021), equation 2 with constant `A`.
    """
    name, a, alpha = _checked(x, a, graph, alpha, edge_order, backend)
    beta, x0 = check_source(_OP, beta, x0, x)
    x_scale, scales, others = check_add(_OP, add, x)
    call = Call(graph, name, x_scale=x_scale, scales=scales)
    return _operator(call, inner_contiguous(x), a, alpha, beta, x0, *others)


def planned(x: Tensor, a: Tensor, graph: Graph, *, alpha: float | Tensor) -> Planned:
    """The operator for many states like `x`, with the same weights `a`, in CSR order."""
    alpha, factor = apart_from_scale(alpha)
    name, *parameters = _checked(x, a, graph, alpha, "csr", "auto")
    call = Call(graph, name, resolved=Resolved(_OP, name, graph))
    return Planned(_operator, call, parameters, x, factor)


def _checked(
    x: Tensor, a: Tensor, graph: Graph, alpha: float | Tensor, edge_order: EdgeOrder,
    backend: Backend,
) -> tuple[str, Tensor, Tensor]:  # fmt: skip
    """What does not depend on the state: the backend, the weights in slot order, and alpha."""
    check_graph(_OP, graph)
    check_tensor(_OP, "x", x, letters="[N, d]", sizes=(graph.num_nodes, None), graph=graph)
    remedy = "Did you mean its mean over heads, a.mean(1)?" if getattr(a, "ndim", 1) == 2 else ""
    check_tensor(_OP, "a", a, letters="[E]", sizes=(graph.num_edges,), like=x, remedy=remedy)
    check_choice(_OP, "edge_order", edge_order, known=EDGE_ORDERS)
    alpha = channel_vector(_OP, "alpha", alpha, x)
    name = choose(_OP, backend, x)
    if edge_order == "user":
        a = to_slots(a, graph)
    return name, inner_contiguous(a), alpha


def _forward(
    call: Call, x: Tensor, a: Tensor, alpha: Tensor, beta: Tensor | None, x0: Tensor | None,
    *others: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    on = call.on(_OP)
    f = on.kernels.csr_diffusion_fwd(
        x, a, alpha=call.scaled(alpha), beta=beta, x0=x0, add=call.add(x, others), csr=on.csr,
    )  # fmt: skip
    return f, ()


def _backward(
    call: Call, df: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool
) -> Gradients:
    x, a, alpha = inputs
    needs_dx, needs_da, needs_dalpha = needs
    on = call.on(_OP)
    dx, da, dalpha = on.kernels.csr_diffusion_bwd(
        df, x, a, alpha=call.scaled(alpha), x_scale=call.x_scale, csr=on.csr, csr_t=on.csr_t,
        needs_dx=needs_dx, needs_da=needs_da, needs_dalpha=needs_dalpha,
    )  # fmt: skip
    return dx, da, None if dalpha is None else call.scaled(dalpha)


def _fake(call: Call, x: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape),)


_operator = Operator(
    _OP, inputs=("x", "a", "alpha"), options=("x_scale", "scales"), has_source=True, saves=0,
    forward=_forward, backward=_backward, fake=_fake,
)  # fmt: skip
