"""`integrate`: the only time loop of the package."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor

from grand_fast.solvers._adjoint import ADJOINTS, Adjoint
from grand_fast.solvers._runge_kutta import ExplicitRungeKutta
from grand_fast.solvers._solution import Solution, Stats
from grand_fast.solvers._solver import AbstractSolver
from grand_fast.solvers._step_control import fixed_steps
from grand_fast.solvers._term import AbstractTerm, CountedTerm, FunctionTerm
from grand_fast.solvers.euler import EULER
from grand_fast.solvers.rk4 import CLASSIC, THREE_EIGHTHS

Method = Literal["euler", "rk4", "rk4_classic"]
METHODS: dict[str, AbstractSolver] = {
    "euler": ExplicitRungeKutta(EULER),
    "rk4": ExplicitRungeKutta(THREE_EIGHTHS),
    "rk4_classic": ExplicitRungeKutta(CLASSIC),
}


def integrate(
    term: AbstractTerm | Callable[[float, Tensor], Tensor],
    x0: Tensor,
    T: float,
    *,
    method: Method = "rk4",
    step_size: float | None = None,
    adjoint: Adjoint = "checkpoint",
) -> Solution:
    """Integrate `dx/dt = f(t, x)` from `x(0) = x0` to time `T`.

    Args:
        term: a term, or a function `f(t, x)` with `t` a Python float.
        x0: initial state, any shape.
        T: end time, at least 0; 0 returns `x0`.
        method: `"euler"` (equation 7), `"rk4"` (3/8 rule, as torchdiffeq) or `"rk4_classic"`
            (equations 33 to 37).
        step_size: length of a step, in units of `t`; the last step is cut to end at `T`. None: one
            step.
        adjoint: `"checkpoint"` keeps the state of each step and runs the step again in backward,
            `"direct"` keeps what every stage saves. Their gradients agree to rounding.

    Returns:
        `Solution` with `.x` (like `x0`), `.stats` and `.status`.

    Differentiable by `x0` and by whatever the term holds.
    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """
    solver = METHODS.get(method)
    if solver is None:
        raise ValueError(
            f"integrate: `method` must be one of {', '.join(METHODS)}, got {method!r}."
        )
    if adjoint not in ADJOINTS:
        raise ValueError(
            f"integrate: `adjoint` must be one of {', '.join(ADJOINTS)}, got {adjoint!r}."
        )
    _check_time("T", T, positive=False)
    if step_size is not None:
        _check_time("step_size", step_size, positive=True)
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        got = str(x0.dtype) if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"integrate: `x0` must be a floating tensor, got {got}.")

    counted = CountedTerm(term if isinstance(term, AbstractTerm) else FunctionTerm(term))
    differentiate = ADJOINTS[adjoint]
    x, accepted = x0, 0
    for t, tau in fixed_steps(float(T), step_size):
        x = differentiate(partial(_step, solver, counted, t, tau), x)
        accepted += 1
    return Solution(x, Stats(nfe=counted.nfe, accepted=accepted, rejected=0))


def _step(solver: AbstractSolver, term: AbstractTerm, t: float, tau: float, x: Tensor) -> Tensor:
    return solver.step(term, t, x, tau)


def _check_time(name: str, value: float, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"integrate: `{name}` must be a float, got {type(value).__name__}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        bound = "above 0" if positive else "at least 0"
        raise ValueError(f"integrate: `{name}` must be finite and {bound}, got {value}.")
