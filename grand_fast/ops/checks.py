"""Checks of shape, dtype and device, made on each call; all raise with one form of message."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grand_fast.graph import Graph

BATCH_REMEDY = (
    "Call it for each x of a batch, or join its graphs as torch_geometric.data.Batch does."
)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def message(op: str, argument: str, expected: str, got: str, remedy: str = "") -> str:
    """Operator, argument, what was expected, what came, and a remedy where there is one."""
    return f"{op}: `{argument}` {expected}, got {got}.{' ' + remedy if remedy else ''}"


def check_graph(op: str, graph: Any) -> None:
    """`graph` is a `Graph`; else a TypeError that says how to build one."""
    if not isinstance(graph, Graph):
        remedy = "Build one with Graph.from_edge_index(edge_index, num_nodes)."
        raise TypeError(message(op, "graph", "must be a Graph", type(graph).__name__, remedy))


def check_tensor(
    op: str,
    name: str,
    value: Any,
    *,
    letters: str,
    sizes: tuple[int | None, ...],
    like: Tensor | None = None,
    graph: Graph | None = None,
    remedy: str = "",
) -> None:
    """`value` is a floating tensor of shape `sizes` (None: any size of at least 1).

    `letters` names the shape ("[N, H, d_k]"); `like` fixes dtype and device, `graph` the device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(message(op, name, "must be a Tensor", type(value).__name__))
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(_not_floating(op, name, value))
    if value.layout is not torch.strided:
        raise TypeError(message(op, name, "must be dense", str(value.layout), "Try .to_dense()."))
    shape = value.shape
    fits = len(shape) == len(sizes)
    for got, want in zip(shape, sizes, strict=False):
        if got != want and (want is not None or got < 1):
            fits = False
    if not fits:
        if name == "x" and value.dim() > len(sizes):
            remedy = BATCH_REMEDY
        want_shape = f"[{', '.join('≥1' if s is None else str(s) for s in sizes)}]"
        expected = f"must have shape {letters} = {want_shape}"
        raise ValueError(message(op, name, expected, str(list(shape)), remedy))
    if like is not None and value.dtype != like.dtype:
        remedy = f"Convert it with .to({like.dtype})."
        raise TypeError(message(op, name, f"must be {like.dtype}", str(value.dtype), remedy))
    device = like.device if like is not None else graph.device if graph is not None else None
    if device is not None and value.device != device:
        remedy = f"Move it with .to('{device}')." if like is not None else "Use graph.to(device)."
        raise ValueError(message(op, name, f"must be on {device}", str(value.device), remedy))


def _not_floating(op: str, name: str, value: Tensor) -> str:
    remedy = "Try .float()."
    if value.is_complex():  # which would drop the imaginary part
        remedy = "Pass its .real and .imag one after the other."
    return message(op, name, "must be floating", str(value.dtype), remedy)


def check_choice(op: str, name: str, value: Any, *, known: tuple[str, ...]) -> None:
    """`value` is one of `known`."""
    if value not in known:
        raise ValueError(message(op, name, f"must be one of {', '.join(known)}", repr(value)))


def check_float(op: str, name: str, value: Any, remedy: str = "") -> None:
    """`value` is a number of Python: an int or a float, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(message(op, name, "must be a float", type(value).__name__, remedy))


def channel_vector(op: str, name: str, value: Any, x: Tensor) -> Tensor:
    """`alpha` or `beta` as a vector `[d]` in float32 or wider, differentiable if it was."""
    d = x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(value, int | float) and not isinstance(value, bool):
        make = torch.full if torch.compiler.is_compiling() else _constant_vector
        try:
            value = float(value)
        except OverflowError:
            expected = "must lie in the range of a float"
            raise ValueError(message(op, name, expected, "a longer integer")) from None
        return make((d,), value, dtype=wide, device=x.device)
    if not isinstance(value, Tensor):
        got = type(value).__name__
        raise TypeError(message(op, name, "must be a float or a Tensor", got))
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(_not_floating(op, name, value))
    if tuple(value.shape) not in ((), (1,), (d,), (1, 1), (1, d)):
        expected = f"must be a scalar, [d] = [{d}] or [1, d], the same for all nodes"
        raise ValueError(message(op, name, expected, str(list(value.shape))))
    if value.device != x.device:
        remedy = f"Move it with .to('{x.device}')."
        raise ValueError(message(op, name, f"must be on {x.device}", str(value.device), remedy))
    return value.reshape(-1).to(wide).expand(d).contiguous()


@lru_cache(maxsize=64)
def _constant_vector(
    shape: tuple[int], value: float, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for backward
        return torch.full(shape, value, dtype=dtype, device=device)


def check_source(
    op: str, beta: Any, x0: Any, x: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`beta` and `x0` come together or not at all."""
    if beta is None and x0 is None:
        return None, None
    if beta is None or x0 is None:
        missing, given = ("beta", "x0") if beta is None else ("x0", "beta")
        raise ValueError(message(op, missing, f"must come with `{given}`", "None"))
    sizes = (x.shape[0], x.shape[1])
    check_tensor(op, "x0", x0, letters="[N, d]", sizes=sizes, like=x)
    return channel_vector(op, "beta", beta, x), inner_contiguous(x0)


def check_add(op: str, add: Any, x: Tensor) -> tuple[float, tuple[float, ...], list[Tensor]]:
    """Checked pairs, those of `x` itself apart: their scale, the other scales and tensors (rows
    contiguous).

    Backward has a pass that writes the gradient by `x` anyway; the share of `x` goes into it.
    """
    x_scale, scales, others = 0.0, [], []
    for pair in add:
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        if not fits or isinstance(pair[0], bool) or not isinstance(pair[0], int | float):
            got = type(pair).__name__
            raise TypeError(message(op, "add", "must hold pairs (float, Tensor [N, d])", got))
        scale, y = pair
        if y is x:
            x_scale += scale
            continue
        sizes = (x.shape[0], x.shape[1])
        check_tensor(op, "add", y, letters="[N, d]", sizes=sizes, like=x)
        scales.append(float(scale))
        others.append(inner_contiguous(y))
    return x_scale, tuple(scales), others


def inner_contiguous(t: Tensor) -> Tensor:
    """`t`, copied only if its rows are not contiguous: launchers take any row stride.

    Or if it is a view that begins in the middle of 32 bits: kernels may read half types in pairs.
    """
    if t.element_size() == 2 and t.shape[-1] % 2 == 0 and t.storage_offset() % 2:
        return t.clone(memory_format=torch.contiguous_format)
    if t.is_contiguous():
        return t
    expected = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t if t.shape[0] <= 1 or t.stride(0) >= expected else t.contiguous()
