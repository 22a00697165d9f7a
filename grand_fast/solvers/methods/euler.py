"""Explicit Euler, the paper's equation 7."""

from fractions import Fraction

from grand_fast.solvers.methods.runge_kutta import ButcherTableau

EULER = ButcherTableau(order=1, a=(), b=(Fraction(1),))
