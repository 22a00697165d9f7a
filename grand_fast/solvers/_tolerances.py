"""Tolerances of the adaptive methods: conventions, and what a float type can attain."""

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

Convention = Literal["released", "paper"]
# tol_scale times these: (rtol, atol)
_CONVENTIONS = {"released": (1e-9, 1e-7), "paper": (1e-6, 1e-12)}
# Without any: torchdiffeq's in float64; in float32 they would be below its resolution.
_DEFAULTS = {torch.float64: (1e-7, 1e-9)}
_NARROW_DEFAULT = (1e-5, 1e-6)
# An error estimate is a sum of slopes, each rounded: in units of the state's own rounding
_NOISE = 4.0
_log = logging.getLogger("grand_fast")


def tolerances(
    dtype: torch.dtype,
    rtol: Any,
    atol: Any,
    tol_scale: Any,
    convention: str,
) -> tuple[float, float]:
    """`rtol` and `atol` as given, by `tol_scale`, or by default.

    Raises:
        TypeError, ValueError: not floats, negative, both 0, or given twice.
    """
    if convention not in _CONVENTIONS:
        known = ", ".join(_CONVENTIONS)
        raise ValueError(f"integrate: `tol_convention` must be one of {known}, got {convention!r}.")
    for name, value in (("rtol", rtol), ("atol", atol), ("tol_scale", tol_scale)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"integrate: `{name}` must be a float, got {type(value).__name__}.")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"integrate: `{name}` must be finite and at least 0, got {value}.")
    if tol_scale is not None:
        if rtol is not None or atol is not None:
            raise ValueError(
                "integrate: `tol_scale` must come without `rtol` and `atol`, got both. "
                "It stands for them."
            )
        rtol, atol = (tol_scale * base for base in _CONVENTIONS[convention])
    defaults = _DEFAULTS.get(dtype, _NARROW_DEFAULT)
    rtol, atol = (d if v is None else v for v, d in zip((rtol, atol), defaults, strict=True))
    if rtol + atol == 0:
        raise ValueError("integrate: `rtol` and `atol` must not both be 0.")
    return float(rtol), float(atol)


def attainable(rtol: float, atol: float, x: Tensor) -> float:
    """`atol`, or the least that the rounding of a state like `x` lets a solve attain.

    Below it the error estimate is rounding error, which no step is short enough for. The larger
    value is named in a warning. Reads one value from the device.
    """
    # Elements that are 0 and stay so: no error over no tolerance would be no number
    atol = max(atol, torch.finfo(_wide(x)).tiny)
    norm = torch.linalg.vector_norm(x.detach(), dtype=_wide(x))
    size = float(norm) / math.sqrt(x.numel()) if x.numel() else 0.0
    least = _NOISE * torch.finfo(x.dtype).eps * size
    if not math.isfinite(least) or atol + rtol * size >= least:
        return atol
    raised = least - rtol * size
    _log.warning(
        "integrate: rtol = %.3g and atol = %.3g are below what %s resolves of a state of %.3g: "
        "the solve goes on with atol = %.3g. Use float64 for less.",
        rtol, atol, str(x.dtype).removeprefix("torch."), size, raised,
    )  # fmt: skip
    return raised


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
