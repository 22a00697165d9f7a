"""The two Runge–Kutta methods of order 4 that GRAND code means by "rk4"."""

from fractions import Fraction

from grand_fast.solvers.methods.runge_kutta import ButcherTableau

# torchdiffeq's `rk4`
THREE_EIGHTHS = ButcherTableau(
    order=4,
    a=((Fraction(1, 3),), (Fraction(-1, 3), Fraction(1)), (Fraction(1), Fraction(-1), Fraction(1))),
    b=(Fraction(1, 8), Fraction(3, 8), Fraction(3, 8), Fraction(1, 8)),
)

# The paper's equations 33 to 37
CLASSIC = ButcherTableau(
    order=4,
    a=((Fraction(1, 2),), (Fraction(0), Fraction(1, 2)), (Fraction(0), Fraction(0), Fraction(1))),
    b=(Fraction(1, 6), Fraction(1, 3), Fraction(1, 3), Fraction(1, 6)),
)
