"""Checks of the number of nodes, the ids and the weights of a graph."""

import numpy as np
import torch
from torch import Tensor

from grand_fast.graph.edge_index import INT32_MAX, message
from grand_fast.kernels.cpu.memory import free_memory

_BYTES_PER_NODE = 28  # a rowptr, and what the other one is counted in: three arrays of int64
_ALWAYS_FITS = 64 << 20  # bytes, of which no machine is asked whether it has them
_RENUMBER = "Number the nodes anew: nodes, edges = edge_index.unique(return_inverse=True)."


def num_nodes_of(given: int | None, size: int | None, receiver: Tensor, sender: Tensor) -> int:
    """`N`: given, that of a matrix, or the largest id plus one; as many as memory has room for."""
    n = _num_nodes(given, size, receiver, sender)
    argument, got = ("edge_index", f"id {n - 1}") if given is None else ("num_nodes", str(n))
    if given is None and size is not None:
        got = f"a matrix of {n} rows"
    if n > INT32_MAX:
        expected = f"must mean at most {INT32_MAX} nodes"
        raise ValueError(message(argument, expected, got, _RENUMBER))
    needed = _BYTES_PER_NODE * n
    if needed > _ALWAYS_FITS and receiver.device.type == "cpu":  # a GPU says so itself
        free = free_memory()
        if needed > free:
            sizes = f"{needed / 1e9:.1f} GB where {free / 1e9:.1f} are free"
            got = f"{got}, so N = {n}, which takes {sizes}"
            expected = "must mean nodes that fit in memory"
            raise ValueError(message(argument, expected, got, _RENUMBER))
    return n


def _num_nodes(given: int | None, size: int | None, receiver: Tensor, sender: Tensor) -> int:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | np.integer):
            raise TypeError(message("num_nodes", "must be an int or None", type(given).__name__))
        if given < 0 or given > INT32_MAX:
            raise ValueError(message("num_nodes", "must lie in [0, 2³¹)", str(given)))
        if size is not None and size != given:
            expected = f"as a matrix must have num_nodes={given} rows"
            raise ValueError(message("edge_index", expected, str(size)))
        return int(given)
    if size is not None:
        return size
    if receiver.numel() == 0:
        return 0
    return max(int(torch.maximum(receiver.max(), sender.max())) + 1, 0)


def check_ids(receiver: Tensor, sender: Tensor, n: int) -> None:
    """Ids lie in `[0, n)`."""
    if receiver.numel() == 0:
        return
    low = int(torch.minimum(receiver.min(), sender.min()))
    high = int(torch.maximum(receiver.max(), sender.max()))
    if low < 0:
        raise ValueError(message("edge_index", "must hold ids of at least 0", f"id {low}"))
    if high >= n:
        remedy = f"Pass num_nodes={high + 1} or drop these edges."
        remedy = _RENUMBER if high >= INT32_MAX else remedy
        expected = f"must hold ids below num_nodes={n}"
        raise ValueError(message("edge_index", expected, f"id {high}", remedy))


def check_weight(weight: Tensor | None, receiver: Tensor, validate: bool) -> None:
    """Floating, one for each edge, on its device; finite too if `validate`."""
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        is_count = isinstance(weight, Tensor) and not weight.is_complex()
        remedy = "Try .float()." if is_count else ""
        raise TypeError(message("edge_weight", "must be a floating tensor", got, remedy))
    e = receiver.numel()
    if tuple(weight.shape) != (e,):
        shape = list(weight.shape)
        remedy = "Did you mean edge_weight.flatten()?" if weight.numel() == e else ""
        raise ValueError(message("edge_weight", f"must have shape [E] = [{e}]", str(shape), remedy))
    if weight.device != receiver.device:
        expected = f"must be on the device of edge_index, {receiver.device}"
        remedy = f"Move it with .to('{receiver.device}')."
        raise ValueError(message("edge_weight", expected, str(weight.device), remedy))
    if validate and not bool(torch.isfinite(weight.detach()).all()):
        bad = int((~torch.isfinite(weight.detach())).nonzero()[0])
        raise ValueError(message("edge_weight", "must be finite", f"{weight[bad]} at edge {bad}"))
