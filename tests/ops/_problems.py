"""Inputs of the operators, and the one comparison of a backend with the float64 reference."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from grand_fast.testing import assert_close

Inputs = Mapping[str, Tensor]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def compare(
    call: Callable[..., Tensor],
    inputs: Inputs,
    *,
    backend: str,
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> None:
    """`call(backend=…, **inputs)` in `dtype`: output and every gradient against float64."""
    # The reference starts from the very numbers that the backend is given.
    given = {name: t.to(dtype) for name, t in inputs.items()}
    results = []
    for name, kind in ((backend, dtype), ("reference", torch.float64)):
        leaves = {key: t.detach().to(kind).requires_grad_() for key, t in given.items()}
        out = call(backend=name, **leaves)
        generator = torch.Generator().manual_seed(99)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(dtype).to(kind))
        results.append({"output": out, **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}})
    got, want = results
    for name in got:
        assert_close(name, got[name], want[name], tolerance=tolerance)
