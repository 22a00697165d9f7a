"""Steps of torchdiffeq's own Runge–Kutta solvers, in fewer passes over the state.

Code that stops early along a trajectory derives a solver from torchdiffeq's classes, which another
`odeint` does not reach. Its steps sum over a table of slopes, each stage anew, and fit a polynomial
that is read once a solve. Here a sum is one pass, and the polynomial is found when it is read.
Times, coefficients, evaluations and the control of steps stay torchdiffeq's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grand_fast.compat.active import active, unusual
from grand_fast.compat.deferred import AbstractRecipe, Deferred, defer
from grand_fast.ops import stage_update
from grand_fast.solvers.owned import owned

NAME = "steps of torchdiffeq's solvers"
_STEP, _FIT = "_runge_kutta_step", "_interp_fit"
_ARGUMENTS = {
    _STEP: ["func", "y0", "f0", "t0", "dt", "t1", "tableau"],
    _FIT: ["self", "y0", "y1", "k", "dt"],
}


class _Theirs:
    """What ours stand for, while they do."""

    step: Callable[..., Any]
    fit: Callable[..., Any]


_installed: list[tuple[Any, str, Any, Any]] = []  # where, name, ours, theirs


def install() -> str | None:
    """Put ours in their place; or why this torchdiffeq is left as it is."""
    try:
        from torchdiffeq._impl import rk_common
    except ImportError as error:
        return f"torchdiffeq cannot be imported: {error}"
    solver = getattr(rk_common, "RKAdaptiveStepsizeODESolver", None)
    found = {_STEP: getattr(rk_common, _STEP, None), _FIT: getattr(solver, _FIT, None)}
    for name, function in found.items():
        if function is None or list(inspect.signature(function).parameters) != _ARGUMENTS[name]:
            return f"its {name} is not the one that is known"
    _Theirs.step, _Theirs.fit = found[_STEP], found[_FIT]  # type: ignore[assignment]
    _installed.append((rk_common, _STEP, _step, _Theirs.step))
    _installed.append((solver, _FIT, _fit, _Theirs.fit))
    for place, name, ours, _ in _installed:
        setattr(place, name, ours)
    return None


def uninstall() -> None:
    """As it was; what somebody else has put there since stays."""
    while _installed:
        place, name, ours, theirs = _installed.pop()
        if vars(place)[name] is ours:
            setattr(place, name, theirs)


def _is_ours(y0: Any, f0: Any) -> bool:
    """Whether a step is one of those that are counted; others are torchdiffeq's own."""
    patch = active("early_stop")
    if patch is None or torch.is_grad_enabled():  # with a graph, theirs
        return False
    of = (y0, f0)
    if not all(type(t) is Tensor and t.layout is torch.strided and t.numel() for t in of):
        return False
    if y0.dtype not in (torch.float32, torch.float64) or unusual() is not None:
        return False
    if (f0.dtype, f0.shape) != (y0.dtype, y0.shape):  # theirs converts and spreads it, or raises
        return False
    patch.report.use(NAME)
    return True


def _step(
    func: Any, y0: Tensor, f0: Tensor, t0: Tensor, dt: Tensor, t1: Tensor, tableau: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_runge_kutta_step`: the state, its slope, the error, and all slopes `[…, stages]`."""
    if not _is_ours(y0, f0):
        found: tuple[Tensor, Tensor, Tensor, Tensor] = _Theirs.step(
            func, y0, f0, t0, dt, t1, tableau
        )
        return found
    from torchdiffeq._impl.misc import Perturb

    t0, dt, t1 = (t.to(y0.dtype) for t in (t0, dt, t1))
    slopes = [f0]
    for alpha, beta in zip(tableau.alpha, tableau.beta, strict=True):
        y = _sum(y0, slopes, beta * dt)
        ends = bool(alpha == 1.0)
        perturb = Perturb.PREV if ends else Perturb.NONE
        slope = owned(func(t1 if ends else t0 + alpha * dt, y, perturb=perturb))
        slopes.append(slope.to(y0.dtype).expand_as(y0))
    if tableau.c_sol[-1] != 0 or not torch.equal(tableau.c_sol[:-1], tableau.beta[-1]):
        y = _sum(y0, slopes, dt * tableau.c_sol)
    error = _sum(None, slopes, dt * tableau.c_error)
    k = defer(_Slopes(slopes), (*y0.shape, len(slopes)), y0)
    return y, slopes[-1], error, k


def _sum(y0: Tensor | None, slopes: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """`y0 + Σ c f`."""
    pairs = [(c, f) for c, f in zip(coefficients.tolist(), slopes, strict=True) if c]
    return stage_update([*([] if y0 is None else [(1.0, y0)]), *pairs])


class _Slopes(AbstractRecipe):
    """Those of a step, as the one table that torchdiffeq makes of them."""

    def __init__(self, slopes: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs = tuple(slopes)

    def compute(self, *inputs: Tensor | None) -> Tensor:
        """`[…, stages]`."""
        return torch.stack([t for t in inputs if t is not None], -1)


def _fit(self: Any, y0: Tensor, y1: Tensor, k: Tensor, dt: Tensor) -> Sequence[Tensor]:
    """`_interp_fit`: the coefficients of the polynomial between the ends of a step."""
    if isinstance(k, Deferred) and isinstance(k.recipe, _Slopes):
        return _Coefficients(lambda: _Theirs.fit(self, y0, y1, k, dt))
    found: Sequence[Tensor] = _Theirs.fit(self, y0, y1, k, dt)
    return found


class _Coefficients(Sequence[Tensor]):
    """The coefficients, found when one is read."""

    def __init__(self, find: Callable[[], Sequence[Tensor]]) -> None:
        self._find: Callable[[], Sequence[Tensor]] | None = find
        self._found: Sequence[Tensor] = ()

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: Any) -> Any:
        if self._find is not None:
            self._found, self._find = self._find(), None
        return self._found[index]
