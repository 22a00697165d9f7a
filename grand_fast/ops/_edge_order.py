"""Edge values between the user's edge order and the slot order of the CSR of `A`."""

from typing import Any, Literal

from torch import Tensor
from torch.autograd import Function

from grand_fast.graph import Graph

EdgeOrder = Literal["user", "csr"]
EDGE_ORDERS = ("user", "csr")


def to_slots(a: Tensor, graph: Graph) -> Tensor:
    """`a [E, …]` in the user's order → slot order."""
    slots: Tensor = _Reorder.apply(a, graph.perm, False)
    return slots


def to_user(a: Tensor, graph: Graph) -> Tensor:
    """`a [E, …]` in slot order → the user's order."""
    user: Tensor = _Reorder.apply(a, graph.perm, True)
    return user


class _Reorder(Function):
    """A permutation of the edges: its backward is its inverse, a copy and no scatter-add."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, perm: Tensor, scatter: bool) -> Tensor:
        ctx.perm, ctx.scatter = perm, scatter
        if not scatter:
            return a.index_select(0, perm)
        user = a.new_empty(a.shape)
        user[perm.long()] = a
        return user

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None, None]:
        return _Reorder.apply(da, ctx.perm, not ctx.scatter), None, None
