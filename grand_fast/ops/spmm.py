"""`spmm`: the product of a graph's matrix with a table of its nodes."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.ops._autograd import Gradients, Operator
from grand_fast.ops._input_types import autocast_inputs, promoted_edges
from grand_fast.ops.backends import Backend, choose
from grand_fast.ops.calls import Call
from grand_fast.ops.checks import check_choice, check_graph, check_tensor, inner_contiguous
from grand_fast.ops.edge_attention import EDGE_ORDERS, EdgeOrder, to_slots

_OP = "spmm"


def spmm(
    graph: Graph,
    values: Float[Tensor, " E"] | Float[Tensor, "E H"],
    x: Float[Tensor, " N"] | Float[Tensor, "N d"] | Float[Tensor, "N H d"],
    *,
    edge_order: EdgeOrder = "user",
    backend: Backend = "auto",
) -> Float[Tensor, " N"] | Float[Tensor, "N d"] | Float[Tensor, "N H d"]:
    """The sparse product `y = A x` of the graph's matrix, with values that are given.

    `y_i = Σ_{j→i} values_ij x_j`

    Args:
        graph: the edges; a node that receives none gets 0.
        values: `[E]`, or `[E, H]`, the values of H matrices. If of another float type than `x`,
            both are promoted to that of `values * x`.
        x: `[N, d]`. With values `[E]` also `[N]`, or `[N, H, d]`, whose heads are all multiplied by
            the one matrix. With values `[E, H]` also `[N, H, d]`, head by head; `[N, d]` is then
            multiplied by each of the matrices.
        edge_order: order of `values`: `"user"`, that of the edge index given to `Graph` (appended
            loops last), or `"csr"`, that of `graph.col`, which saves a permutation.
        backend: `"auto"` goes by the device of `x`.

    Returns:
        `y`, of the shape of `x`; `[N, H, d]` of values `[E, H]`. In the dtype of `values * x`.

    Differentiable by `values` and `x`, which it saves; in memory of `values` and of `x` or `y`:
    nothing has a row `[d]` for each edge.
    """
    return _spmm(x, values, graph, edge_order=edge_order, backend=backend)


@autocast_inputs
@promoted_edges("values")
def _spmm(
    x: Tensor, values: Tensor, graph: Graph, *, edge_order: EdgeOrder, backend: Backend
) -> Tensor:
    check_graph(_OP, graph)
    _check_tables(graph, values, x)
    check_choice(_OP, "edge_order", edge_order, known=EDGE_ORDERS)
    name = choose(_OP, backend, x)
    by_head = values.dim() == 2
    shape = (len(x), values.shape[1], x.shape[-1]) if by_head else tuple(x.shape)
    if not by_head or x.dim() == 2:  # one matrix multiplies heads as it does columns
        x = x.reshape(len(x), 1, x.shape[1:].numel())
    a = values if by_head else values[:, None]
    if edge_order == "user":
        a = to_slots(a, graph)
    return _operator(Call(graph, name), inner_contiguous(x), a.contiguous()).reshape(shape)


def _check_tables(graph: Graph, values: Any, x: Any) -> None:
    """The values, and what x may be with them."""
    n, e, heads = graph.num_nodes, graph.num_edges, None
    if getattr(values, "ndim", 1) == 2:
        check_tensor(_OP, "values", values, letters="[E, H]", sizes=(e, None), graph=graph)
        heads = values.shape[1]
    else:
        remedy = "Values of H matrices are [E, H]."
        check_tensor(_OP, "values", values, letters="[E]", sizes=(e,), graph=graph, remedy=remedy)
    kinds = {1: ("[N]", (n,)), 2: ("[N, d]", (n, None)), 3: ("[N, H, d]", (n, heads, None))}
    rank = getattr(x, "ndim", 2)
    if rank not in kinds or (heads and rank == 1):
        rank = 3
    letters, sizes = kinds[rank]
    check_tensor(_OP, "x", x, letters=letters, sizes=sizes, graph=graph)


def _forward(call: Call, x: Tensor, a: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    on = call.on(_OP)
    return on.kernels.spmm_fwd(x, a, csr=on.csr), ()


def _backward(
    call: Call, dy: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool
) -> Gradients:
    x, a = inputs
    on = call.on(_OP)
    grads: Gradients = on.kernels.spmm_bwd(
        dy, x, a, csr=on.csr, csr_t=on.csr_t, needs_dx=needs[0], needs_da=needs[1]
    )
    return grads


def _fake(call: Call, x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    return (x.new_empty([x.shape[0], a.shape[1], x.shape[2]]),)


_operator = Operator(
    _OP, inputs=("x", "a"), options=(), saves=0, forward=_forward, backward=_backward, fake=_fake
)
