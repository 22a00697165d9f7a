"""Gradients of what a diffusion operator adds: the source `beta · x0`, and `Σ c y`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grand_fast.ops.backends import column_dots


def source_gradients(
    df: Tensor,
    beta: Tensor | None,
    x0: Tensor | None,
    needs_dbeta: bool,
    needs_dx0: bool,
    *,
    by_kernel: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`dbeta = Σ_i df_i · x0_i` `[d]` in float32 or wider, and `dx0 = beta · df`, as needed.

    By the CPU's kernel a table of the products is spared; it is not differentiable.
    """
    dbeta = dx0 = None
    if needs_dbeta and x0 is not None:
        if by_kernel:
            dbeta = column_dots()(df, x0)
        else:
            wide = torch.promote_types(df.dtype, torch.float32)
            dbeta = (df.to(wide) * x0.to(wide)).sum(0)
    if needs_dx0 and beta is not None:
        dx0 = (beta * df).to(df.dtype)
    return dbeta, dx0


def added_gradients(
    df: Tensor, scales: tuple[float, ...], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `Σ c y` by each y that needs one, from that by the sum."""
    scaled = zip(scales, needed, strict=True)
    return [(df if c == 1.0 else df * c) if wanted else None for c, wanted in scaled]
