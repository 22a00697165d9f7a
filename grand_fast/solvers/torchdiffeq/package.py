"""torchdiffeq's own solvers, and the options that its methods know."""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

_ARGUMENTS = ("func", "y0", "rtol", "atol")  # of its solvers, beside the options
_ON_A_GRID = {"step_size", "grid_constructor", "interp", "perturb", "norm"}
_ADAMS = {*_ON_A_GRID, "max_order", "max_iters"}
_BY_ERROR = {"first_step", "min_step", "max_step", "step_t", "jump_t", "safety", "ifactor",
             "dfactor", "max_num_steps", "norm", "dtype"}  # fmt: skip
# Of each method that our solvers have: the name in torchdiffeq's warnings, and what it knows
_OPTIONS = {
    "euler": ("Euler", _ON_A_GRID),
    "midpoint": ("Midpoint", _ON_A_GRID),
    "rk4": ("RK4", _ON_A_GRID),
    "explicit_adams": ("AdamsBashforth", _ADAMS),
    "implicit_adams": ("AdamsBashforthMoulton", {*_ADAMS, "implicit"}),
    "fixed_adams": ("AdamsBashforthMoulton", {*_ADAMS, "implicit"}),
    "dopri5": ("Dopri5Solver", _BY_ERROR),
    "bosh3": ("Bosh3Solver", _BY_ERROR),
    "adaptive_heun": ("AdaptiveHeunSolver", _BY_ERROR),
}


@cache
def solvers() -> tuple[Any, Any]:
    """Its `odeint` and `odeint_adjoint`.

    From where they are defined: `torchdiffeq.odeint` may be ours by now. Imported when first asked
    for: torchdiffeq takes scipy along, and most calls need neither.
    """
    from torchdiffeq._impl.adjoint import odeint_adjoint
    from torchdiffeq._impl.odeint import odeint

    return odeint, odeint_adjoint


def is_known(method: str) -> bool:
    """Whether our solvers have the method."""
    return method in _OPTIONS


def known_options(operator: str, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the method knows; of others torchdiffeq warns, in these words, and goes on.

    Raises:
        TypeError: an argument among them.
    """
    name, known = _OPTIONS[method]
    twice = [key for key in options if key in _ARGUMENTS]
    if method == "explicit_adams" and "implicit" in options:
        twice.append("implicit")
    if twice:
        raise TypeError(f"{operator}: `options` must not hold {', '.join(twice)}, which is given.")
    unused = {key: value for key, value in options.items() if key not in known}
    if unused:
        warnings.warn(f"{name}: Unexpected arguments {unused}", stacklevel=4)
    return {key: value for key, value in options.items() if key in known}
