"""Solvers of ordinary differential equations: they know time, and neither graph nor kernel."""

from grand_fast.solvers._adjoint import Adjoint
from grand_fast.solvers._continuous import ContinuousOptions
from grand_fast.solvers._integrate import integrate
from grand_fast.solvers._methods import METHODS, Method
from grand_fast.solvers._odeint_adjoint import odeint_adjoint
from grand_fast.solvers._solution import Solution, Stats, Status
from grand_fast.solvers._term import AbstractTerm, Combination
from grand_fast.solvers.adams import ExplicitAdams, ImplicitAdams
from grand_fast.solvers.odeint import odeint

__all__ = [
    "METHODS",
    "AbstractTerm",
    "Adjoint",
    "Combination",
    "ContinuousOptions",
    "ExplicitAdams",
    "ImplicitAdams",
    "Method",
    "Solution",
    "Stats",
    "Status",
    "integrate",
    "odeint",
    "odeint_adjoint",
]
