"""torchdiffeq's own solvers, what is left to them, and the options that methods know."""

import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from grand_fast.solvers.solver import AbstractAdaptiveSolver, AbstractSolver

_ARGUMENTS = ("func", "y0", "rtol", "atol")  # of its solvers, beside the options
_ON_A_GRID = {"step_size", "grid_constructor", "interp", "perturb", "norm"}
_ADAMS = {*_ON_A_GRID, "max_order", "max_iters"}
_BY_ERROR = {"first_step", "min_step", "max_step", "step_t", "jump_t", "safety", "ifactor",
             "dfactor", "max_num_steps", "norm", "dtype"}  # fmt: skip
# Of methods that torchdiffeq has not
_OURS_ON_A_GRID = _ON_A_GRID - {"perturb"}
_OURS_BY_ERROR = _BY_ERROR - {"step_t", "jump_t", "norm", "dtype"}
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
    "rk4_classic": ("ExplicitRungeKutta", _OURS_ON_A_GRID),
    "semi_implicit_euler": ("SemiImplicitEuler", _OURS_ON_A_GRID),
    "uniformisation": ("Uniformisation", _OURS_ON_A_GRID),
}
BY_ERROR = ("dopri5", "bosh3", "adaptive_heun")
OF_A_MATRIX = ("semi_implicit_euler", "uniformisation")
OURS_ALONE = ("rk4_classic", *OF_A_MATRIX)


@cache
def solvers() -> tuple[Any, Any]:
    """Its `odeint` and `odeint_adjoint`.

    From where they are defined: `torchdiffeq.odeint` may be ours by now. Imported when first asked
    for: torchdiffeq takes scipy along, and most calls need neither.
    """
    from torchdiffeq._impl.adjoint import odeint_adjoint
    from torchdiffeq._impl.odeint import odeint

    return odeint, odeint_adjoint


@cache
def part(name: str) -> ModuleType:
    """A module of what it is made of: `odeint`, `interp` or `event_handling`."""
    return import_module(f"torchdiffeq._impl.{name}")


def is_known(method: str) -> bool:
    """Whether our solvers have the method."""
    return method in _OPTIONS


def is_ours_alone(method: str | AbstractSolver) -> bool:
    """Whether torchdiffeq lacks it."""
    return isinstance(method, AbstractSolver) or method in OURS_ALONE


def reason_for_theirs(
    y0: Any,
    t: Any,
    method: str | AbstractSolver | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Any = None,
) -> str | None:
    """Why our solvers do not take a call of `odeint`, which torchdiffeq's take; None if ours do."""
    method, options = "dopri5" if method is None else method, options or {}
    chooses_steps = method in BY_ERROR or isinstance(method, AbstractAdaptiveSolver)
    reason = reason_for_state(y0, t)
    if reason is not None:
        return reason
    if not isinstance(method, AbstractSolver) and not is_known(method):
        return f"method {method!r} is torchdiffeq's own"
    if event_fn is not None and not chooses_steps:
        return "it looks for an event by fixed steps"
    if any(isinstance(v, Tensor) and v.requires_grad for v in options.values()):
        return "an option requires a gradient"
    if is_ours_alone(method):
        return None
    if chooses_steps:
        given = [n for n in ("step_t", "jump_t") if options.get(n) is not None]
        given += ["dtype"] * (options.get("dtype", torch.float64) != torch.float64)
    else:
        given = ["perturb"] * bool(options.get("perturb", False))
        if "adams" in str(method) and not 4 <= options.get("max_order", 12) <= 12:
            given.append("max_order")
    if not given:
        return None
    name = given[0]
    return f"`{name}` is {options[name] if name in ('dtype', 'max_order') else 'given'}"


def reason_for_state(y0: Any, t: Any) -> str | None:
    """The same of the state and the times alone."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    if any(isinstance(part, Tensor) and part.is_complex() for part in parts):
        return "`y0` is complex"
    if isinstance(t, Tensor) and t.requires_grad:
        return "`t` requires a gradient"
    return None


def known_options(
    operator: str, method: str | AbstractSolver, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Those that the method knows; of others torchdiffeq warns, in these words, and goes on.

    Raises:
        TypeError: an argument among them.
    """
    if isinstance(method, AbstractAdaptiveSolver):
        name, known = type(method).__name__, _OURS_BY_ERROR
    elif isinstance(method, AbstractSolver):
        name, known = type(method).__name__, _OURS_ON_A_GRID
    else:
        name, known = _OPTIONS[method]
    twice = [key for key in options if key in _ARGUMENTS]
    if method == "explicit_adams" and "implicit" in options:
        twice.append("implicit")
    if twice:
        raise TypeError(f"{operator}: `options` must not hold {', '.join(twice)}, which is given.")
    unused = {key: value for key, value in options.items() if key not in known}
    if unused:
        warnings.warn(f"{name}: Unexpected arguments {unused}", stacklevel=5)
    return {key: value for key, value in options.items() if key in known}
