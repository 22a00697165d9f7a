"""A pair state: velocities beside positions, so that a term is a force (GraphCON)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grand_fast.ops import stage_update
from grand_fast.ops.checks import message
from grand_fast.solvers import AbstractTerm, Combination, Scale
from grand_fast.solvers.checks import check_scale
from grand_fast.solvers.combination import check_field, pair
from grand_fast.solvers.term import as_term


def graphcon(
    coupling: AbstractTerm | Callable[[float, Tensor], Tensor],
    *,
    gamma: Scale = 1.0,
    alpha: Scale = 1.0,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> AbstractTerm:
    """Oscillators that a graph couples, of positions `x` and velocities `y`.

    `x' = y`, `y' = σ(F(t, x)) − gamma x − alpha y`

    The state is `torch.cat([y, x], 1)`, `[N, 2d]`, with the velocities first as in the released
    code; `y, x = solution.x.chunk(2, 1)`.

    Args:
        coupling: F, a term or a function of t and `x [N, d]`. GraphCON's `A x` is `linear` or
            `attention`, `A x − x`, with 1 less of `gamma`.
        gamma: of the restoring force, a float or a tensor (scalar or `[d]`).
        alpha: of the damping, likewise.
        activation: σ, of a tensor `[N, d]`; None: none.

    Returns:
        A term of such states. Without σ, all of y' is one pass of the coupling.

    Differentiable by what the coupling is, `gamma`, `alpha` and parameters of σ.
    Reference: GraphCON (Rusch et al. 2022), section 2.
    """
    op = "terms.graphcon"
    if not callable(coupling):
        got = type(coupling).__name__
        raise TypeError(message(op, "coupling", "must be a term or a function f(t, x)", got))
    if activation is not None and not callable(activation):
        got = type(activation).__name__
        raise TypeError(message(op, "activation", "must be a function or None", got))
    check_scale(op, "gamma", gamma)
    check_scale(op, "alpha", alpha)
    return GraphCON(as_term(coupling), gamma, alpha, activation)


class GraphCON(AbstractTerm):
    """`x' = y`, `y' = σ(F(t, x)) − gamma x − alpha y`; what it returns is new."""

    returns_new = True

    def __init__(self, coupling: AbstractTerm, gamma: Scale, alpha: Scale, activation: Any) -> None:
        self.coupling, self.gamma, self.alpha = coupling, gamma, alpha
        self.activation = activation

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the coupling and of σ, and the scales that are tensors."""
        scales = [s for s in (self.gamma, self.alpha) if isinstance(s, Tensor)]
        module = self.activation if isinstance(self.activation, nn.Module) else nn.Identity()
        return (*self.coupling.tensors(), *scales, *module.parameters())

    def planned(self, x: Tensor) -> AbstractTerm:
        """The same with the coupling planned."""
        coupling = self.coupling.planned(self._halves(x)[1])
        return GraphCON(coupling, self.gamma, self.alpha, self.activation)

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`[y', x']`."""
        y, x = self._halves(x)
        forces = [pair(-c, z) for c, z in ((self.gamma, x), (self.alpha, y)) if not _is_zero(c)]
        if self.activation is None:
            force = self.coupling.axpy(t, x, Combination(forces), 1.0)
        else:
            force = self.activation(self.coupling.vf(t, x))
            force = stage_update([*forces, (1.0, check_field(force, x))])
        return torch.cat([force, y], 1)

    def _halves(self, state: Tensor) -> tuple[Tensor, Tensor]:
        if state.dim() != 2 or state.shape[1] % 2:
            expected = "must have shape [N, 2d], velocities beside positions"
            remedy = "Use torch.cat([y, x], 1)."
            raise ValueError(
                message("terms.graphcon", "x", expected, str(list(state.shape)), remedy)
            )
        y, x = state.chunk(2, dim=1)
        return y, x


def _is_zero(scale: Scale) -> bool:
    return not isinstance(scale, Tensor) and scale == 0
