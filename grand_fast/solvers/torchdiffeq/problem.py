"""The problem of an `odeint` call in the solvers' terms: one tensor, and time that rises."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor

from grand_fast.solvers.combination import Combination, check_field
from grand_fast.solvers.half_precision import WideTerm
from grand_fast.solvers.step_control import Norm, rms_norm
from grand_fast.solvers.term import AbstractLinearTerm, AbstractTerm
from grand_fast.solvers.time_loop import Callback, Callbacks

State = Tensor | tuple[Tensor, ...]
Func = Callable[..., Any]
Tolerance = float | Tensor | tuple[float, ...]
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclass(frozen=True, eq=False)
class Problem:
    """What is integrated.

    term, x0: the field in rising time, and the state at the first time, as one tensor.
    t:        times, rising, in the caller's float type; on the host.
    sign:     −1 where the caller's times fall; the caller's time is `sign · t`.
    shapes:   of the caller's tuple of tensors; None where it is one tensor.
    operator: what the caller called, for messages.
    dtype:    of the caller's state.
    """

    func: Func
    term: AbstractTerm
    x0: Tensor
    t: Tensor
    sign: int
    shapes: list[Size] | None
    operator: str
    dtype: torch.dtype

    def widened(self) -> "Problem":
        """With a state that steps can be added up in: that of a half type is of float32."""
        term, x0 = WideTerm.of(self.term, self.x0)
        return replace(self, term=term, x0=x0)

    def tolerance(self, name: str, value: Any) -> float | Tensor:
        """A float, or a tensor that fits the state: of one value per tensor of a tuple, say."""
        if isinstance(value, Tensor):
            assert not value.requires_grad, (
                f"{self.operator}: `{name}` must not require a gradient."
            )
        if isinstance(value, str):
            raise TypeError(f"{self.operator}: `{name}` must be a float or a Tensor, got a str.")
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
            if not 0 <= float(value) < math.inf:
                raise ValueError(
                    f"{self.operator}: `{name}` must be finite and at least 0, got {value}."
                )
            return float(value)
        dtype, device = self.x0.dtype, self.x0.device
        if self.shapes is None:
            return torch.as_tensor(value, dtype=dtype, device=device)
        parts = [torch.as_tensor(v, dtype=dtype, device=device) for v in value]
        assert len(parts) == len(self.shapes), (
            f"{self.operator}: `{name}` must hold one value per tensor of `y0`, "
            f"{len(self.shapes)}, got {len(parts)}."
        )
        sized = zip(parts, self.shapes, strict=True)
        return torch.cat([part.expand(shape.numel()) for part, shape in sized])

    def norm(self, given: Callable[..., Any] | None) -> Norm | None:
        """`given`, of the state as one tensor; None where that is the root mean square."""
        return None if self.shapes is None and given is None else flat_norm(given, self.shapes)

    def callbacks(self, method: str, heard: Iterable[str], dtype: torch.dtype) -> Callbacks:
        """The caller's, by the attributes of `func`; times of type `dtype`."""
        found = {n: c for n in CALLBACKS if (c := getattr(self.func, n, None)) is not None}
        deaf = sorted(set(found) - set(heard))
        if deaf:
            warnings.warn(f"Solver '{method}' does not support callbacks {deaf}", stacklevel=3)
        return Callbacks(*(self._callback(found.get(n), dtype) for n in CALLBACKS))

    def _callback(self, call: Callable[..., object] | None, dtype: torch.dtype) -> Callback | None:
        if call is None:
            return None

        def callback(t: float, x: Tensor, tau: float) -> None:
            x = x.to(self.dtype)
            state = x if self.shapes is None else split(x, self.shapes)
            times = (torch.full((), v, dtype=dtype, device=x.device) for v in (self.sign * t, tau))
            start, length = times
            call(start, state, length)

        return callback


def pose(func: Func, y0: State, t: Tensor, operator: str) -> Problem:
    """The problem, its parts checked as torchdiffeq checks them, with its types of exception."""
    t = _check_times(t, operator)
    x0, shapes = joined(y0, operator)
    if not x0.is_floating_point():
        raise TypeError(f"{operator}: `y0` must be floating, got {x0.dtype}. Try .float().")
    term: AbstractTerm
    if isinstance(func, AbstractTerm) and shapes is None:
        term = GivenTerm(func, operator)
    else:
        term = TensorField(func, shapes, operator)
    falls = len(t) > 1 and bool(t[0] > t[1])
    if falls:
        t, term = -t, ReversedTerm(term)
    return Problem(func, term, x0, t, -1 if falls else 1, shapes, operator, x0.dtype)


def joined(y0: State, operator: str) -> tuple[Tensor, list[Size] | None]:
    """The state as one tensor, and the shapes of its parts if it is a tuple."""
    if isinstance(y0, Tensor):
        return y0, None
    is_tuple = isinstance(y0, tuple) and all(isinstance(part, Tensor) for part in y0)
    got = "an empty tuple" if y0 == () else type(y0).__name__
    assert is_tuple and y0, f"{operator}: `y0` must be a Tensor or a tuple of them, got {got}."
    return join(y0), [part.shape for part in y0]


def _check_times(t: Tensor, operator: str) -> Tensor:
    assert isinstance(t, Tensor), f"{operator}: `t` must be a Tensor, got {type(t).__name__}."
    if not t.is_floating_point():
        raise TypeError(f"{operator}: `t` must be floating, got {t.dtype}. Try .float().")
    assert t.ndim == 1 and len(t) > 0, (
        f"{operator}: `t` must have shape [times], one at least, got {list(t.shape)}."
    )
    t = t.detach().cpu()
    steps = t.diff()
    assert bool((steps > 0).all() or (steps < 0).all()), (
        f"{operator}: `t` must be strictly increasing or decreasing."
    )
    return t


class GivenTerm(AbstractTerm):
    """A term of the caller's."""

    def __init__(self, term: AbstractTerm, operator: str) -> None:
        self.term, self.operator = term, operator

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f(t, x)`."""
        return check_field(self.term.vf(t, x), x, f"{self.operator}: `func`")

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f(t, x)`, fused where the term does that."""
        if type(self.term).axpy is AbstractTerm.axpy:
            return super().axpy(t, x, base, tau)
        return self.term.axpy(t, x, base, tau)

    def freeze(self, t: float, x: Tensor) -> AbstractLinearTerm:
        """The term with its matrix at `x`."""
        return self.term.freeze(t, x)

    def linear(self) -> AbstractLinearTerm:
        """The term, if its matrix is constant."""
        return self.term.linear()


class TensorField(AbstractTerm):
    """A function of a scalar tensor `t` and the caller's state, as torchdiffeq calls it."""

    def __init__(self, func: Func, shapes: list[Size] | None, operator: str) -> None:
        self.func, self.shapes, self.operator = func, shapes, operator

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f(t, x)`."""
        return self.at(torch.full((), t, dtype=x.dtype, device=x.device), x)

    def at(self, t: Tensor, x: Tensor) -> Tensor:
        """`f(t, x)`, of the type and shape of `x` where what the function returns can have them.

        Raises:
            TypeError, ValueError: it cannot.
        """
        if self.shapes is None:
            return self._like(self.func(t, x), x)
        parts = split(x, self.shapes)
        found = self.func(t, parts)
        is_several = isinstance(found, Iterable) and not (
            isinstance(found, Tensor) and not found.ndim
        )
        found = tuple(found) if is_several else found
        if not is_several or len(found) != len(parts):
            got = str(len(found)) if is_several else type(found).__name__
            raise TypeError(
                f"{self.operator}: `func` must return as many Tensors as `y0` has, {len(parts)}, "
                f"got {got}."
            )
        return join(self._like(f, part) for f, part in zip(found, parts, strict=True))

    def _like(self, f: Any, x: Tensor) -> Tensor:
        if not isinstance(f, Tensor):
            got = type(f).__name__
            raise TypeError(f"{self.operator}: `func` must return a Tensor, got {got}.")
        if f.is_complex():
            raise TypeError(
                f"{self.operator}: `func` must return f like `y0`, {x.dtype}, got {f.dtype}."
            )
        if f.device != x.device:
            raise ValueError(
                f"{self.operator}: `func` must return f where `y0` is, on {x.device}, got "
                f"{f.device}. Move it with .to(y.device)."
            )
        if f.shape == x.shape:
            return f.to(x.dtype)
        # Parts of a tuple count by their elements, as in torchdiffeq, which joins them
        if self.shapes is not None and f.numel() == x.numel():
            return f.to(x.dtype).reshape(x.shape)
        try:
            return f.to(x.dtype).expand_as(x)
        except RuntimeError:
            raise ValueError(
                f"{self.operator}: `func` must return f of the shape of `y0`, {list(x.shape)}, "
                f"got {list(f.shape)}."
            ) from None


class ReversedTerm(AbstractTerm):
    """`−f(−t, x)`: the field seen by a time that rises while the caller's falls."""

    def __init__(self, term: AbstractTerm) -> None:
        self.term = term

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`−f(−t, x)`."""
        return -self.term.vf(-t, x)

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base − tau · f(−t, x)`."""
        return self.term.axpy(-t, x, base, -tau)


def join(parts: Iterable[Tensor]) -> Tensor:
    """All elements in one row."""
    return torch.cat([part.reshape(-1) for part in parts])


def split(x: Tensor, shapes: list[Size]) -> tuple[Tensor, ...]:
    """The tensors that `join` put together, of states `x` that may have axes before."""
    parts = x.split([shape.numel() for shape in shapes], dim=-1)
    return tuple(
        part.reshape((*x.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)
    )


def flat_norm(given: Callable[..., Any] | None, shapes: list[Size] | None) -> Norm:
    """A norm of the caller's state as one of the joined state; torchdiffeq's choice for None."""
    inner: Callable[..., Any] = given or (rms_norm if shapes is None else mixed_norm)

    def norm(x: Tensor) -> Tensor:
        value: Tensor = inner(x if shapes is None else split(x, shapes))
        return value.abs()

    return norm


def mixed_norm(parts: tuple[Tensor, ...]) -> Tensor:
    """The largest root mean square among the tensors of a state."""
    norms = [rms_norm(part) for part in parts if part.numel()]
    return torch.stack(norms or [parts[0].new_zeros(())]).max()
