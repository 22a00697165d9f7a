"""Checks of what `integrate` is given; all raise with one form of message."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grand_fast.ops.checks import check_float


class OptionError(Exception):
    """An option that does not fit another, or what is solved: no fault of a program."""


class OptionTypeError(OptionError, TypeError):
    """One that does not fit the term."""


class OptionValueError(OptionError, ValueError):
    """One whose value does not fit."""


class UnsupportedOptionError(OptionError, NotImplementedError):
    """One that is not supported beside another."""


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """`value` is one of `known`."""
    if value not in known:
        raise ValueError(f"integrate: `{name}` must be one of {', '.join(known)}, got {value!r}.")


def check_number(name: str, value: float, *, positive: bool) -> None:
    """`value` is a finite float, above 0 or at least 0."""
    check_float("integrate", name, value)
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(f"integrate: `{name}` must lie in the range of a float.") from None
    if not is_finite or value < 0 or (positive and value == 0):
        bound = "above 0" if positive else "at least 0"
        raise ValueError(f"integrate: `{name}` must be finite and {bound}, got {value}.")


def check_scale(op: str, name: str, value: Any) -> None:
    """`value` is a float, or a floating tensor: a scalar, or one value per channel."""
    if not isinstance(value, Tensor):
        check_float(op, name, value, "Or a Tensor: a scalar, or one value per channel.")
    elif not value.is_floating_point():
        raise TypeError(f"{op}: `{name}` must be floating, got {value.dtype}.")
    elif value.dim() > 1:
        got = list(value.shape)
        raise ValueError(f"{op}: `{name}` must be a scalar or have shape [d], got {got}.")


def check_count(name: str, value: int | None) -> None:
    """`value` is None or an int of at least 1."""
    if value is not None:
        check_int("integrate", name, value, low=1, kind="an int or None")


def check_int(
    op: str, name: str, value: Any, *, low: int | None = None, kind: str = "an int"
) -> None:
    """`value` is an int, of at least `low`; `kind` is what the message says it must be."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: `{name}` must be {kind}, got {type(value).__name__}.")
    if low is not None and value < low:
        raise ValueError(f"{op}: `{name}` must be at least {low}, got {value}.")


def check_share(op: str, name: str, value: Any) -> None:
    """`value` is a float between 0 and 1, neither of them."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{op}: `{name}` must be between 0 and 1, got {value!r}.")


def check_times(times: Sequence[float] | None, T: float) -> list[float]:
    """Output times that rise within `[0, T]`."""
    if times is None:
        return []
    wanted = [float(t) for t in times]
    rises = all(a < b for a, b in zip(wanted, wanted[1:], strict=False))
    if not wanted or not rises or not (wanted[0] >= 0 and wanted[-1] <= T):
        got = f"{wanted[:3]}…" if len(wanted) > 3 else f"{wanted}"
        raise ValueError(f"integrate: `times` must rise within [0, T] = [0, {T:g}], got {got}.")
    return wanted
