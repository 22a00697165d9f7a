"""Gradients of the source term `beta · x0`, the same for every diffusion operator."""

import torch
from torch import Tensor

_BLOCK = 1 << 18  # elements


def source_gradients(
    df: Tensor, beta: Tensor | None, x0: Tensor | None, needs_dbeta: bool, needs_dx0: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`dbeta = Σ_i df_i · x0_i` `[d]` in float32 or wider, and `dx0 = beta · df`, as needed."""
    dbeta = dx0 = None
    if needs_dbeta and x0 is not None:
        dbeta = _column_dots(df, x0)
    if needs_dx0 and beta is not None:
        dx0 = (beta * df).to(df.dtype)
    return dbeta, dx0


def _column_dots(df: Tensor, x0: Tensor) -> Tensor:
    """`Σ_i df_i · x0_i`, on the CPU some rows at a time: their products stay in cache."""
    wide = torch.promote_types(df.dtype, torch.float32)
    n, d = df.shape
    if df.is_cuda or torch.compiler.is_compiling():
        return (df.to(wide) * x0.to(wide)).sum(0)
    total = df.new_zeros(d, dtype=wide)
    rows = max(1, _BLOCK // d)
    for first in range(0, n, rows):
        block = slice(first, first + rows)
        total += (df[block].to(wide) * x0[block].to(wide)).sum(0)
    return total
