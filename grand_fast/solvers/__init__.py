"""Solvers of ordinary differential equations: they know time, and neither graph nor kernel."""

from grand_fast.solvers._adjoint import Adjoint
from grand_fast.solvers._continuous import ContinuousOptions
from grand_fast.solvers._integrate import integrate
from grand_fast.solvers._methods import METHODS, Method
from grand_fast.solvers._solution import Solution, Stats, Status
from grand_fast.solvers._term import AbstractTerm, Combination

__all__ = [
    "METHODS",
    "AbstractTerm",
    "Adjoint",
    "Combination",
    "ContinuousOptions",
    "Method",
    "Solution",
    "Stats",
    "Status",
    "integrate",
]
