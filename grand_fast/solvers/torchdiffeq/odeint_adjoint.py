"""`odeint_adjoint`: torchdiffeq's continuous adjoint on our solvers."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Size, Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from grand_fast.solvers.step_control import Norm
from grand_fast.solvers.torchdiffeq import package
from grand_fast.solvers.torchdiffeq.calls import (
    check_options,
    check_theirs,
    odeint_as,
    shared,
    with_defaults,
)
from grand_fast.solvers.torchdiffeq.problem import (
    CALLBACKS,
    Func,
    State,
    TensorField,
    Tolerance,
    flat_norm,
    joined,
    mixed_norm,
    split,
)
from grand_fast.solvers.torchdiffeq.solves import How

_NAME = "odeint_adjoint"


def odeint_adjoint(
    func: Callable[..., State],
    y0: State,
    t: Tensor,
    *,
    rtol: Tolerance | None = None,
    atol: Tolerance | None = None,
    method: str | None = None,
    options: Mapping[str, object] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Tolerance | None = None,
    adjoint_atol: Tolerance | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, object] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> State | tuple[Tensor, State]:
    """`odeint` whose gradient is a second solve, back in time, as `torchdiffeq.odeint_adjoint`.

    `da/dt = −a ∂f/∂y`, `dg/dt = −a ∂f/∂θ`: memory does not grow with the number of steps, but the
    gradient is only as exact as the second solve, which diffusion makes ill-posed over long times;
    `integrate` has exact ones.

    Args:
        func, y0, t, rtol, atol, method, options: as for `odeint`; methods by name.
        event_fn: as for `odeint`; hands the call to torchdiffeq, as does a complex `y0` or a `t`
            that requires a gradient.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: of the second solve; by default
            as the first, but for the norm. `adjoint_options["norm"]` may be `"seminorm"`, which
            leaves the parameters' part out of the error, or a function of the tuple
            `(adjoint of t, y, adjoint of y, *adjoints of the parameters)`.
        adjoint_params: what receives a gradient beside `y0`; None: the parameters of `func`.

    Returns:
        As `odeint`.

    Raises:
        ValueError: `func` is no module and `adjoint_params` is None, or another `adjoint_method`
            leaves it unclear which of `options` it takes, or wants a matrix.

    Differentiable once, by `y0` and `adjoint_params`.
    Reference: Chen et al. 2018, Neural Ordinary Differential Equations, algorithm 1.
    """
    check_options(_NAME, options=options, adjoint_options=adjoint_options)
    is_module = isinstance(func, torch.nn.Module)
    if adjoint_params is None and not is_module:
        raise ValueError(
            "odeint_adjoint: `func` must be a Module, or `adjoint_params` given. "
            "Pass () where nothing but y0 needs a gradient."
        )
    if adjoint_params is not None:
        adjoint_params = tuple(adjoint_params)
    _check_methods(method, adjoint_method)
    is_other = adjoint_method not in (None, method)
    if is_other and options is not None and adjoint_options is None:
        raise ValueError(
            "odeint_adjoint: `adjoint_options` must be given beside `options` where "
            "`adjoint_method` is not `method`."
        )
    forward = with_defaults(How(rtol, atol, method, options), y0)
    reason = package.reason_for_state(y0, t)
    if event_fn is not None:
        reason = "it looks for an event"
    # A replica's parameters are plain attributes, which torchdiffeq knows how to find.
    if getattr(func, "_is_replica", False):
        reason = "`func` is a replica"
    if reason is not None:
        check_theirs(_NAME, reason, forward)
        answer: State | tuple[Tensor, State] = package.solvers()[1](
            func, y0, t, **shared(forward), event_fn=event_fn, adjoint_rtol=adjoint_rtol,
            adjoint_atol=adjoint_atol, adjoint_method=adjoint_method,
            adjoint_options=adjoint_options, adjoint_params=adjoint_params,
        )  # fmt: skip
        return answer
    if adjoint_params is None:
        adjoint_params = tuple(func.parameters())  # type: ignore[attr-defined]
    params = tuple(p for p in adjoint_params if p.requires_grad)

    x0, shapes = joined(y0, _NAME)
    given: dict[str, Any] = dict(options or {})
    state_norm = flat_norm(given.pop("norm", None), shapes)
    inner = given if adjoint_options is None else dict(adjoint_options)
    if len(params) != len(adjoint_params) and callable(inner.get("norm")):
        warnings.warn(
            "odeint_adjoint: parameters without requires_grad are no part of the adjoint norm.",
            stacklevel=2,
        )
    inner["norm"] = _adjoint_norm(inner.get("norm"), state_norm, shapes)
    backward = How(
        forward.rtol if adjoint_rtol is None else adjoint_rtol,
        forward.atol if adjoint_atol is None else adjoint_atol,
        method if adjoint_method is None else adjoint_method,
        inner,
    )
    solve = _Solve(func, shapes, t, forward, backward)
    xs: Tensor = _AdjointFunction.apply(solve, x0, *params)
    return xs if shapes is None else split(xs, shapes)


def _check_methods(method: Any, adjoint_method: Any) -> None:
    for name, value in (("method", method), ("adjoint_method", adjoint_method)):
        if not isinstance(value, str | None):
            raise TypeError(
                f"{_NAME}: `{name}` must be a name or None, got {type(value).__name__}. "
                "gf.integrate takes solvers, and has this gradient by adjoint='continuous'."
            )
    backward = adjoint_method or method
    if backward in package.OF_A_MATRIX:
        raise ValueError(
            f"{_NAME}: `adjoint_method` must be a method for any f, as dopri5, got {backward!r}: "
            "the adjoint equations have no matrix."
        )


@dataclass(frozen=True, eq=False)
class _Solve:
    """Both solves of a call: the function, the shapes of its state, times, and their options."""

    func: Func
    shapes: list[Size] | None
    t: Tensor
    forward: How
    backward: How

    def augmented(self, params: tuple[Tensor, ...]) -> Func:
        """The field of `(adjoint of t, y, a, *g)`.

        torchdiffeq integrates the first, and lets it count in the error, whether or not the times
        require a gradient; so do we, to take its steps.
        """

        given = TensorField(self.func, self.shapes, _NAME)

        def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            y, a = state[1:3]
            with torch.enable_grad():
                inputs = (t.detach().requires_grad_(), y.detach().requires_grad_(), *params)
                f = given.at(*inputs[:2])
                grads: tuple[Tensor | None, ...] = (None,) * len(inputs)
                if f.requires_grad:
                    # Kept: what `func` computed once, before the solve, is shared by all of them
                    grads = torch.autograd.grad(f, inputs, -a, allow_unused=True, retain_graph=True)
            pairs = zip(grads, inputs, strict=True)
            dt, *others = (torch.zeros_like(v) if g is None else g for g, v in pairs)
            return dt, f.detach(), *others

        for name in CALLBACKS:
            heard = getattr(self.func, f"{name}_adjoint", None)
            if heard is not None:
                setattr(field, name, heard)
        return field


class _AdjointFunction(Function):
    """States at the times; backward solves the augmented problem from each to the one before."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, x0: Tensor, *params: Tensor) -> Tensor:
        with torch.no_grad():
            y0 = x0 if solve.shapes is None else split(x0, solve.shapes)
            found = cast(State, odeint_as(_NAME, solve.func, y0, solve.t, solve.forward))
            xs = found if isinstance(found, Tensor) else _rows(found)
        ctx.solve = solve
        # By this name torchdiffeq's users find the norm, or put another in its place
        ctx.adjoint_options = solve.backward.options
        ctx.save_for_backward(xs, *params)
        return xs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dxs: Tensor) -> tuple[Tensor | None, ...]:
        solve: _Solve = ctx.solve
        xs, *params = ctx.saved_tensors
        field = solve.augmented(tuple(params))
        dt, a, grads = xs.new_zeros(()), dxs[-1], [torch.zeros_like(p) for p in params]
        for i in range(len(solve.t) - 1, 0, -1):
            back = solve.t[i - 1 : i + 1].flip(0)
            found = odeint_as(
                _NAME, field, (dt, xs[i], a, *grads), back, solve.backward,
                warns=i == len(solve.t) - 1,
            )  # fmt: skip
            dt, _, a, *grads = (states[1] for states in found)
            a = a + dxs[i - 1]
        return None, a, *grads


def _adjoint_norm(
    given: Any, state_norm: Norm, shapes: list[Size] | None
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The norm of `(t, y, a, *g)`: the caller's, or the largest of its parts' norms."""
    if callable(given):

        def own(state: tuple[Tensor, ...]) -> Tensor:
            t, y, a, *grads = state
            parts = (y, a) if shapes is None else (*split(y, shapes), *split(a, shapes))
            value: Tensor = given((t, *parts, *grads))
            return value

        return own

    def largest(state: tuple[Tensor, ...]) -> Tensor:
        t, y, a, *grads = state
        norms = [t.abs(), state_norm(y), state_norm(a)]
        if grads and given != "seminorm":
            norms.append(mixed_norm(tuple(grads)))
        return torch.stack(norms).max()

    return largest


def _rows(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)
