"""Inputs of the operators, and the one comparison of a backend with the float64 reference."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grand_fast.testing import TOLERANCE, assert_close

Inputs = Mapping[str, Tensor]
_NOTHING = 1e-14  # a float64 result that should be 0
_OF_TERMS = 10.0


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
    specification: Callable[..., Tensor] | None = None,
) -> None:
    """`call(backend=…, **inputs)` in `dtype`: output and every gradient against float64.

    What it should be says `specification(**inputs)`, or `call` of the reference.
    """
    reference = specification or partial(call, backend="reference")
    # The reference starts from the very numbers that the backend is given.
    given = {name: t.to(dtype) for name, t in inputs.items()}
    results = []
    for run, kind in ((partial(call, backend=backend), dtype), (reference, torch.float64)):
        leaves = {key: t.detach().to(kind).requires_grad_() for key, t in given.items()}
        out = run(**leaves)
        generator = torch.Generator().manual_seed(99)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        upstream = upstream.to(dtype).to(kind)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream, materialize_grads=True)
        results.append({"output": out, **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}})
    got, want = results
    for name in got:
        _assert_close(name, got[name], want[name], tolerance or TOLERANCE[dtype])


def compare_added(call: Callable[..., Tensor], inputs: Inputs) -> None:
    """What is given to `call(x=…, add=…)` to add, among it x, is added; with every gradient."""
    more = {name: normal(*inputs["x"].shape, seed=seed) for seed, name in enumerate("yz")}

    def together(*, y: Tensor, z: Tensor, **given: Any) -> Tensor:
        x = given["x"]
        return call(**given, add=[(2.0, x), (-0.5, y), (1.0, z), (0.25, x)])

    def after(*, y: Tensor, z: Tensor, **given: Any) -> Tensor:
        return call(**given, backend="reference") + 2.25 * given["x"] - 0.5 * y + z

    for dtype in (torch.float32, torch.float64):
        for backend in ("cpu", "reference"):
            compare(together, {**inputs, **more}, backend=backend, dtype=dtype, specification=after)


def compare_one_gradient(
    call: Callable[..., Tensor], inputs: Inputs, name: str, backend: str
) -> None:
    """What a backward skips where one input alone needs a gradient does not change that one."""
    grads = []
    for of in (backend, "reference"):
        leaf = inputs[name].clone().requires_grad_()
        f = call(**{**inputs, name: leaf}, backend=of)
        grads.append(torch.autograd.grad(f.square().sum(), leaf)[0])
    assert_close(f"d{name}", *grads)


def _assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    if want.numel() and want.abs().max() < _NOTHING:
        # Terms of order 1 cancel: what is left is their rounding, which nothing can be compared to.
        assert_close(name, got.double() / _OF_TERMS, torch.zeros_like(want), tolerance=tolerance)
    else:
        assert_close(name, got, want, tolerance=tolerance)
