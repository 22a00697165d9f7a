"""Tolerances of the adaptive methods: conventions, and what a float type can attain."""

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

from grand_fast.solvers.checks import OptionValueError, check_choice, check_number

Convention = Literal["released", "paper"]
# tol_scale times these: (rtol, atol)
_CONVENTIONS = {"released": (1e-9, 1e-7), "paper": (1e-6, 1e-12)}
Tolerance = float | Tensor
# Without any: torchdiffeq's in float64; in narrower types they would be below its resolution.
_DEFAULTS = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (1e-4, 1e-4),
    torch.bfloat16: (1e-3, 1e-3),
}
# An error estimate is a sum of slopes, each rounded: in units of the state's own rounding
_NOISE = 4.0
# The same where slopes alone are rounded, not their sum: a shorter step has less of that. Measured:
# as many steps as exact slopes take; half as many again at a quarter of it, fivefold at a 64th.
_NOISE_OF_SLOPES = 1 / 16
_log = logging.getLogger("grand_fast")


def tolerances(
    dtype: torch.dtype, rtol: Any, atol: Any, tol_scale: Any, convention: str
) -> tuple[float, float]:
    """`rtol` and `atol` as given, by `tol_scale`, or by default.

    Raises:
        TypeError, ValueError: not floats, negative, both 0, or given twice.
    """
    check_choice("tol_convention", convention, tuple(_CONVENTIONS))
    for name, value in (("rtol", rtol), ("atol", atol), ("tol_scale", tol_scale)):
        if value is not None:
            check_number(name, value, positive=False)
    if tol_scale is not None:
        if rtol is not None or atol is not None:
            raise OptionValueError(
                "integrate: `tol_scale` must come without `rtol` and `atol`, got both. "
                "It stands for them."
            )
        rtol, atol = (tol_scale * base for base in _CONVENTIONS[convention])
    defaults = default_tolerances(dtype)
    rtol, atol = (d if v is None else v for v, d in zip((rtol, atol), defaults, strict=True))
    if rtol + atol == 0:
        raise OptionValueError("integrate: `rtol` and `atol` must not both be 0.")
    return float(rtol), float(atol)


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether it is a half type."""
    return dtype in (torch.float16, torch.bfloat16)


def default_tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """`rtol` and `atol` of a solve of states of a type."""
    return _DEFAULTS.get(dtype, _DEFAULTS[torch.float32])


def attainable(rtol: float, atol: float, x: Tensor, *, warns: bool = True) -> float:
    """`atol`, or the least that the rounding of a state like `x` lets a solve attain.

    Below it the error estimate is rounding error, which no step is short enough for. The larger
    value is named in a warning if it `warns`. Reads one value from the device.
    """
    # Elements that are 0 and stay so: no error over no tolerance would be no number
    atol = max(atol, torch.finfo(wide(x.dtype)).tiny)
    size = _size(x)
    least = _NOISE * torch.finfo(x.dtype).eps * size
    if not math.isfinite(least) or atol + rtol * size >= least:
        return atol
    raised = least - rtol * size
    if warns:
        _log.warning(
            "integrate: rtol = %.3g and atol = %.3g are below what %s resolves of a state of "
            "%.3g: the solve goes on with atol = %.3g. Use float64 for less.",
            rtol, atol, _name(x.dtype), size, raised,
        )  # fmt: skip
    return raised


def attainable_by_slopes(
    operator: str, rtol: Tolerance, atol: Tolerance, x: Tensor, dtype: torch.dtype,
    *, warns: bool = True,
) -> tuple[Tolerance, Tolerance]:  # fmt: skip
    """Both, or the least that a solve attains whose slopes alone are rounded, to `dtype`.

    Of half types, whose states are added up in a wider one. As `attainable` otherwise; but `rtol`
    is raised as well, for states that grow. Tolerances may be tensors like `x`.

    warns: the larger values are named in a warning.
    """
    size = _size(x)
    least = _NOISE_OF_SLOPES * torch.finfo(dtype).eps
    if not math.isfinite(size) or _reaches(rtol, least):
        return rtol, atol
    if size > 0 and _reaches(atol + rtol * size, least * size):
        return rtol, atol
    given = _least(rtol), _least(atol)
    rtol, atol = _raised(rtol, least), _raised(atol, least * size)
    if warns:
        _log.warning(
            "%s: rtol = %.3g and atol = %.3g are below what %s resolves of a state of %.3g: the "
            "solve goes on with rtol = %.3g and atol = %.3g. Use float32 or float64 for less.",
            operator, *given, _name(dtype), size, _least(rtol), _least(atol),
        )  # fmt: skip
    return rtol, atol


def _reaches(value: Tolerance, least: float) -> bool:
    return bool((value >= least).all()) if isinstance(value, Tensor) else value >= least


def _raised(value: Tolerance, least: float) -> Tolerance:
    return value.clamp(min=least) if isinstance(value, Tensor) else max(value, least)


def _least(value: Tolerance) -> float:
    return float(value.min()) if isinstance(value, Tensor) else value


def _size(x: Tensor) -> float:
    """Root mean square over all elements."""
    norm = torch.linalg.vector_norm(x.detach(), dtype=wide(x.dtype))
    return float(norm) / math.sqrt(x.numel()) if x.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to add up in: float32 for what is narrower, else itself."""
    return torch.promote_types(dtype, torch.float32)
