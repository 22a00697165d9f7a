"""Values of edges in another float type than the nodes': both in the one torch promotes them to."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from grand_fast.ops._autocast import Cast
from grand_fast.ops.checks import FLOAT_DTYPES

P = ParamSpec("P")


def promoted_edges(name: str) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Run an operator with argument `name`, values of edges, and the tensors of its nodes, which
    have the type of its first argument, in the type that torch gives their product.

    Weights of a graph often come in a type of their own, as sparse libraries have it. Tensors of
    nodes that differ among themselves stay so, and are refused.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        names = list(inspect.signature(function).parameters)
        first, position = names[0], names.index(name)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            edges: Any = args[position] if len(args) > position else kwargs.get(name)
            nodes: Any = args[0] if args else kwargs.get(first)
            if not isinstance(edges, Tensor) or not isinstance(nodes, Tensor):
                return function(*args, **kwargs)
            types = (nodes.dtype, edges.dtype)
            if types[0] == types[1] or not all(t in FLOAT_DTYPES for t in types):
                return function(*args, **kwargs)
            cast = Cast(torch.promote_types(*types), types)
            given = {key: cast(v) for key, v in kwargs.items()}
            return function(*map(cast, args), **given)

        return call

    return decorate
