"""Solvers of ordinary differential equations: they know time, and neither graph nor kernel."""

from grand_fast.solvers.combination import Add, Combination, Scale
from grand_fast.solvers.integrate import integrate
from grand_fast.solvers.methods.adams import ExplicitAdams, ImplicitAdams
from grand_fast.solvers.methods.semi_implicit_euler import SemiImplicitEuler
from grand_fast.solvers.methods.table import ADAPTIVE, METHODS, Method
from grand_fast.solvers.methods.uniformisation import Uniformisation
from grand_fast.solvers.solution import Solution, SolveError, Stats, Status
from grand_fast.solvers.solve import Adjoint, ContinuousOptions, Regularizer, Solve
from grand_fast.solvers.solver import AbstractAdaptiveSolver, AbstractSolver, Step
from grand_fast.solvers.term import AbstractLinearTerm, AbstractTerm
from grand_fast.solvers.torchdiffeq.odeint import odeint, odeint_dense, odeint_event
from grand_fast.solvers.torchdiffeq.odeint_adjoint import odeint_adjoint

__all__ = [
    "ADAPTIVE", "METHODS", "AbstractAdaptiveSolver", "AbstractLinearTerm", "AbstractSolver",
    "AbstractTerm", "Add", "Adjoint", "Combination", "ContinuousOptions", "ExplicitAdams",
    "ImplicitAdams", "Method", "Regularizer", "Scale", "SemiImplicitEuler", "Solution", "Solve",
    "SolveError", "Stats", "Status", "Step", "Uniformisation", "integrate", "odeint",
    "odeint_adjoint", "odeint_dense", "odeint_event",
]  # fmt: skip
