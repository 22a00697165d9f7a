"""The explicit midpoint rule, of order 2."""

from fractions import Fraction

from grand_fast.solvers.methods.runge_kutta import ButcherTableau

MIDPOINT = ButcherTableau(order=2, a=((Fraction(1, 2),),), b=(Fraction(0), Fraction(1)))
