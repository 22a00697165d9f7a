"""Gradients of the source term `beta · x0`, the same for every diffusion operator."""

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
