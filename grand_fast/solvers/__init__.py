"""Solvers of ordinary differential equations: they know time, and neither graph nor kernel."""

from grand_fast.solvers._adjoint import Adjoint
from grand_fast.solvers._continuous import ContinuousOptions
from grand_fast.solvers._integrate import integrate
from grand_fast.solvers._methods import ADAPTIVE, METHODS, Method
from grand_fast.solvers._odeint_adjoint import odeint_adjoint
from grand_fast.solvers._solution import Solution, SolveError, Stats, Status
from grand_fast.solvers._term import AbstractLinearTerm, AbstractTerm, Add, Combination, Scale
from grand_fast.solvers.adams import ExplicitAdams, ImplicitAdams
from grand_fast.solvers.odeint import odeint
from grand_fast.solvers.semi_implicit_euler import SemiImplicitEuler
from grand_fast.solvers.uniformisation import Uniformisation

__all__ = [
    "ADAPTIVE",
    "METHODS",
    "AbstractLinearTerm",
    "AbstractTerm",
    "Add",
    "Adjoint",
    "Combination",
    "ContinuousOptions",
    "ExplicitAdams",
    "ImplicitAdams",
    "Method",
    "Scale",
    "SemiImplicitEuler",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "Uniformisation",
    "integrate",
    "odeint",
    "odeint_adjoint",
]
