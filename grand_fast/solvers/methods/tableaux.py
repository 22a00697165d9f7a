"""The coefficients of the Runge–Kutta methods, with fixed steps and in adaptive pairs."""

from dataclasses import replace
from fractions import Fraction

from grand_fast.solvers.methods.embedded_pairs import EmbeddedPair
from grand_fast.solvers.methods.runge_kutta import ButcherTableau


def _fractions(*values: str) -> tuple[Fraction, ...]:
    return tuple(Fraction(v) for v in values)


def _difference(b: tuple[Fraction, ...], lower: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    padded = (*b, *[Fraction(0)] * (len(lower) - len(b)))
    return tuple(p - q for p, q in zip(padded, lower, strict=True))


# Equation 7 of the paper
EULER = ButcherTableau(order=1, a=(), b=_fractions("1"))

MIDPOINT = ButcherTableau(order=2, a=(_fractions("1/2"),), b=_fractions("0", "1"))

# torchdiffeq's `rk4`
THREE_EIGHTHS = ButcherTableau(
    order=4,
    a=(_fractions("1/3"), _fractions("-1/3", "1"), _fractions("1", "-1", "1")),
    b=_fractions("1/8", "3/8", "3/8", "1/8"),
)

# The paper's equations 33 to 37
CLASSIC = ButcherTableau(
    order=4,
    a=(_fractions("1/2"), _fractions("0", "1/2"), _fractions("0", "0", "1")),
    b=_fractions("1/6", "1/3", "1/3", "1/6"),
)

# Dormand–Prince 5(4), the paper's dopri5
_B5 = _fractions("35/384", "0", "500/1113", "125/192", "-2187/6784", "11/84")
# Order 4, Shampine's choice, whose error estimate torchdiffeq uses
_B4 = _fractions("1951/21600", "0", "22642/50085", "451/720", "-12231/42400", "649/6300", "1/60")
DORMAND_PRINCE = EmbeddedPair(
    ButcherTableau(
        order=5,
        a=(
            _fractions("1/5"),
            _fractions("3/40", "9/40"),
            _fractions("44/45", "-56/15", "32/9"),
            _fractions("19372/6561", "-25360/2187", "64448/6561", "-212/729"),
            _fractions("9017/3168", "-355/33", "46732/5247", "49/176", "-5103/18656"),
        ),
        b=_B5,
    ),
    error=_difference(_B5, _B4),
    middle=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)

# Bogacki–Shampine 3(2)
_B3 = _fractions("2/9", "1/3", "4/9")
# The cubic through both ends and their slopes, at half a step
BOGACKI_SHAMPINE = EmbeddedPair(
    ButcherTableau(order=3, a=(_fractions("1/2"), _fractions("0", "3/4")), b=_B3),
    error=_difference(_B3, _fractions("7/24", "1/4", "1/3", "1/8")),
    middle=(17 / 72, 1 / 6, 2 / 9, -1 / 8),
)
# torchdiffeq's state at half a step: between the ends of steps of order 2
BOGACKI_SHAMPINE_OF_TORCHDIFFEQ = replace(BOGACKI_SHAMPINE, middle=(0.0, 0.5, 0.0, 0.0))

# Heun 2(1). Its last slope belongs to Euler's step, not to the state that is kept; the next step
# starts with it all the same, as torchdiffeq's does, which costs no order.
HEUN = EmbeddedPair(
    ButcherTableau(order=2, a=(_fractions("1"),), b=_fractions("1/2", "1/2")),
    error=_fractions("1/2", "-1/2"),
    middle=(0.5, 0.0),
    is_fsal=False,
)
