"""Tensors that an operator adds to its result in the same pass: `f + Σ_s c_s y_s`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grand_fast.kernels.csr import Add
from grand_fast.ops.checks import check_tensor, inner_contiguous, message


def check_add(op: str, add: Any, x: Tensor) -> tuple[float, tuple[float, ...], list[Tensor]]:
    """Checked pairs, those of `x` itself apart: their scale, the other scales and tensors (rows
    contiguous).

    Backward has a pass that writes the gradient by `x` anyway; the share of `x` goes into it.
    """
    of_x, scales, others = 0.0, [], []
    for pair in add:
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        if not fits or isinstance(pair[0], bool) or not isinstance(pair[0], int | float):
            got = type(pair).__name__
            raise TypeError(message(op, "add", "must hold pairs (float, Tensor [N, d])", got))
        scale, y = pair
        if y is x:
            of_x += scale
            continue
        sizes = (x.shape[0], x.shape[1])
        check_tensor(op, "add", y, letters="[N, d]", sizes=sizes, like=x)
        scales.append(float(scale))
        others.append(inner_contiguous(y))
    return of_x, tuple(scales), others


def pairs(x: Tensor, of_x: float, scales: tuple[float, ...], others: Sequence[Tensor]) -> Add:
    """The pairs again, those of `x` as one."""
    mine = [(of_x, x)] if of_x else []
    return [*mine, *zip(scales, others, strict=True)]


def gradients(df: Tensor, scales: tuple[float, ...], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradient by each of the other tensors that needs one."""
    scaled = zip(scales, needed, strict=True)
    return [(df if c == 1.0 else df * c) if wanted else None for c, wanted in scaled]
