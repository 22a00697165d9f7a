"""Edge values between the user's edge order and the slot order of the CSR of `A`."""

from typing import Any, Literal

from torch import Tensor
from torch.autograd import Function

from grand_fast.graph import Graph
from grand_fast.ops.backends import transforms_active

EdgeOrder = Literal["user", "csr"]
EDGE_ORDERS = ("user", "csr")


def to_slots(a: Tensor, graph: Graph) -> Tensor:
    """`a [E, …]` in the user's order → slot order."""
    if transforms_active():
        return _reordered(a, graph.perm, False)
    slots: Tensor = _Reorder.apply(a, graph.perm, False)
    return slots


def to_user(a: Tensor, graph: Graph) -> Tensor:
    """`a [E, …]` in slot order → the user's order."""
    if transforms_active():
        return _reordered(a, graph.perm, True)
    user: Tensor = _Reorder.apply(a, graph.perm, True)
    return user


def _reordered(a: Tensor, perm: Tensor, scatter: bool) -> Tensor:
    if not scatter:
        return a.index_select(0, perm)
    return a.new_zeros(a.shape).index_copy(0, perm.long(), a)


class _Reorder(Function):
    """A permutation of the edges: its backward is its inverse, a copy and no scatter-add."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, perm: Tensor, scatter: bool) -> Tensor:
        ctx.perm, ctx.scatter = perm, scatter
        return _reordered(a, perm, scatter)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None, None]:
        reorder = _reordered if transforms_active() else _Reorder.apply
        return reorder(da, ctx.perm, not ctx.scatter), None, None
