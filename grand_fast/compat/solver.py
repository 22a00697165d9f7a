"""In the place of torchdiffeq's `odeint` and `odeint_adjoint`: ours, to the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grand_fast.compat.active import active, unusual
from grand_fast.compat.options import Report
from grand_fast.solvers import odeint as our_odeint
from grand_fast.solvers import odeint_adjoint as our_odeint_adjoint
from grand_fast.solvers.torchdiffeq import package

ODEINT, ODEINT_ADJOINT = "torchdiffeq.odeint", "torchdiffeq.odeint_adjoint"
EXACT = f"{ODEINT_ADJOINT}, by exact gradients"


def odeint(func: Any, y0: Any, t: Tensor, **options: Any) -> Any:
    """`torchdiffeq.odeint`: the same method, tolerances and evaluations.

    Args:
        func, y0, t, options: as there. Options that the method does not know, as a step size with
            dopri5, are named in the warning that torchdiffeq gives, and otherwise ignored.

    Returns:
        The states at `t`.
    """
    report = _report(ODEINT, y0, t, options)
    if report is None:
        return package.solvers()[0](func, y0, t, **options)
    report.use(ODEINT)
    return our_odeint(func, y0, t, **options)


def odeint_adjoint(func: Any, y0: Any, t: Tensor, **options: Any) -> Any:
    """`torchdiffeq.odeint_adjoint`: the same, with its second solve for the gradient.

    Under `patch(solver="exact")` through every stage instead, so by all that `func` holds.

    Args:
        func, y0, t, options: as there.

    Returns:
        The states at `t`.
    """
    report = _report(ODEINT_ADJOINT, y0, t, options)
    if report is None:
        return package.solvers()[1](func, y0, t, **options)
    patch = active("solver")
    if patch is not None and patch.solver == "exact":
        report.use(EXACT)
        own = {name: value for name, value in options.items() if not name.startswith("adjoint_")}
        return our_odeint(func, y0, t, adjoint="auto", **own)
    report.use(ODEINT_ADJOINT)
    return our_odeint_adjoint(func, y0, t, **options)


def _report(name: str, y0: Any, t: Tensor, options: dict[str, Any]) -> Report | None:
    """That of the patch, where the call is one for our solvers."""
    patch = active("solver")
    if patch is None:
        return None
    reason = unusual()
    for prefix in ("", "adjoint_"):
        method, given = options.get(f"{prefix}method"), options.get(f"{prefix}options")
        found = package.reason_for_theirs(
            y0, t, method or options.get("method"), given if isinstance(given, Mapping) else None
        )
        if found is not None:
            reason = f"{prefix}{found}" if method and found.startswith("method") else found
    if options.get("event_fn") is not None:
        reason = "it looks for an event"
    if reason is None:
        return patch.report
    patch.report.leave(name, reason)
    return None
