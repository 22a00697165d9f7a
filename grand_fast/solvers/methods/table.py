"""The table of methods: a name → its solver."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from grand_fast.solvers.methods import tableaux
from grand_fast.solvers.methods.adams import ExplicitAdams, ImplicitAdams
from grand_fast.solvers.methods.embedded_pairs import EmbeddedPair, EmbeddedRungeKutta
from grand_fast.solvers.methods.runge_kutta import ButcherTableau, ExplicitRungeKutta
from grand_fast.solvers.methods.semi_implicit_euler import SemiImplicitEuler
from grand_fast.solvers.methods.uniformisation import Uniformisation
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.tolerances import attainable, attainable_by_slopes, is_narrow

Method = Literal[
    "euler", "midpoint", "rk4", "rk4_classic", "dopri5", "bosh3", "adaptive_heun",
    "explicit_adams", "implicit_adams",
    "semi_implicit_euler", "uniformisation",
]  # fmt: skip
Make = Callable[[float, float], AbstractSolver]  # of rtol and atol


def _fixed(tableau: ButcherTableau) -> Make:
    solver = ExplicitRungeKutta(tableau)
    return lambda rtol, atol: solver


def _pair(pair: EmbeddedPair) -> Make:
    return lambda rtol, atol: EmbeddedRungeKutta(pair, rtol=rtol, atol=atol)


METHODS: dict[str, Make] = {
    "euler": _fixed(tableaux.EULER),
    "midpoint": _fixed(tableaux.MIDPOINT),
    "rk4": _fixed(tableaux.THREE_EIGHTHS),
    "rk4_classic": _fixed(tableaux.CLASSIC),
    "dopri5": _pair(tableaux.DORMAND_PRINCE),
    "bosh3": _pair(tableaux.BOGACKI_SHAMPINE),
    "adaptive_heun": _pair(tableaux.HEUN),
    "explicit_adams": lambda rtol, atol: ExplicitAdams(),
    "implicit_adams": lambda rtol, atol: ImplicitAdams(rtol=rtol, atol=atol),
    "semi_implicit_euler": lambda rtol, atol: SemiImplicitEuler(),
    "uniformisation": lambda rtol, atol: Uniformisation(),
}
ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun")


def solver_of(
    method: str | AbstractSolver,
    rtol: float,
    atol: float,
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    warns: bool = True,
) -> AbstractSolver:
    """The solver that a name stands for, with tolerances that states like `x` can attain.

    dtype: of what `f` returns, if not that of `x`; warns: of tolerances that are raised.
    """
    if isinstance(method, AbstractSolver):
        return method
    dtype = dtype or x.dtype
    if is_narrow(dtype):
        if method in ADAPTIVE or method == "implicit_adams":
            both = attainable_by_slopes("integrate", rtol, atol, x, dtype, warns=warns)
            rtol, atol = map(float, both)
    elif method in ADAPTIVE:
        atol = attainable(rtol, atol, x, warns=warns)
    return METHODS[method](rtol, atol)
