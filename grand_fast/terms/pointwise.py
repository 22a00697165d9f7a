"""Terms that see each node alone: a source, and reactions."""

from collections.abc import Callable

import torch
from torch import Tensor

from grand_fast.ops.checks import FLOAT_DTYPES, check_choice, message
from grand_fast.solvers import AbstractTerm, Scale
from grand_fast.solvers.checks import check_scale
from grand_fast.solvers.term import Constant


def source(x0: Tensor, beta: Scale = 1.0) -> AbstractTerm:
    """What feeds the diffusion, whatever the state.

    `f = beta x0`

    Args:
        x0: like the state.
        beta: source scale, a float or a tensor (scalar or `[d]`).

    Returns:
        A term, constant: it adds no pass to an evaluation, and to a linear term adds up to one.

    Differentiable by `x0` and `beta`.
    Reference: GRAND (Chamberlain et al. 2021), section 4; GREAD (Choi et al. 2023), source term.
    """
    op = "terms.source"
    if not isinstance(x0, Tensor):
        raise TypeError(message(op, "x0", "must be a Tensor", type(x0).__name__))
    if x0.dtype not in FLOAT_DTYPES:
        raise TypeError(message(op, "x0", "must be floating", str(x0.dtype), "Try .float()."))
    check_scale(op, "beta", beta)
    term: AbstractTerm = Constant(x0).scaled(beta)
    return term


def _fisher(x: Tensor) -> Tensor:
    return torch.addcmul(x, x, x, value=-1)


def _allen_cahn(x: Tensor) -> Tensor:
    return torch.addcmul(x, x * x, x, value=-1)


def _zeldovich(x: Tensor) -> Tensor:
    square = x * x
    return torch.addcmul(square, square, x, value=-1)


REACTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "fisher": _fisher,
    "allen_cahn": _allen_cahn,
    "zeldovich": _zeldovich,
}


def reaction(name: str, coefficient: Scale = 1.0) -> AbstractTerm:
    """What each node does by itself.

    `f = coefficient · r(x)`, element by element:

    - `"fisher"`: `r = x (1 − x)`
    - `"allen_cahn"`: `r = x (1 − x²)`, the force of ACMP's double well
    - `"zeldovich"`: `r = x² (1 − x)`

    Args:
        name: one of these.
        coefficient: a float or a tensor (scalar or `[d]`).

    Returns:
        A term. Another reaction is a function of t and x, which adds up with terms as well.

    Differentiable by `coefficient`.
    Reference: GREAD (Choi et al. 2023), GREAD-F, -AC and -Z; ACMP (Wang et al. 2023).
    """
    check_choice("terms.reaction", "name", name, known=tuple(REACTIONS))
    check_scale("terms.reaction", "coefficient", coefficient)
    term: AbstractTerm = Reaction(REACTIONS[name]).scaled(coefficient)
    return term


class Reaction(AbstractTerm):
    """`f = r(x)`, of a function that depends on nothing else."""

    def __init__(self, r: Callable[[Tensor], Tensor]) -> None:
        self.r = r

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`r(x)`."""
        return self.r(x)

    def tensors(self) -> tuple[Tensor, ...]:
        """None."""
        return ()
