"""Linear combinations: of tensors, as a step adds them up, and of terms, as `+` and `*` do."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grand_fast.ops import stage_update
from grand_fast.solvers.checks import check_scale

Scale = float | Tensor  # a float, a scalar tensor, or one value per channel
Add = Sequence[tuple[float, Tensor]]
# (a, y, scale, add) → scale · A y + Σ c z, differentiable by all tensors, `a` the entries of A. It
# must not hold `a`: a solver keeps it for backward, where autograd keeps the entries.
Matrix = Callable[[Tensor, Tensor, Scale, Add], Tensor]
# c, s and g of the addends `c · s · g(t, x)` of a sum; all tensors in s multiply, and g is a term
Part = tuple[float, Sequence[Tensor], Any]


@dataclass(frozen=True, eq=False)
class Combination:
    """`Σ_s c_s y_s`, not yet added up: a term may do that in the pass that computes `f`."""

    terms: Sequence[tuple[float, Tensor]]  # at least one; no coefficient is 0

    def evaluate(self) -> Tensor:
        """The sum; `y` itself, not a copy, where it is all."""
        if len(self.terms) == 1 and self.terms[0][0] == 1.0:
            return self.terms[0][1]
        return stage_update(self.terms)


def pair(scale: Scale, y: Tensor) -> tuple[float, Tensor]:
    """`scale · y` for a combination: a product where the scale is a tensor."""
    return (1.0, scaled(y, [scale])) if isinstance(scale, Tensor) else (scale, y)


def scaled(y: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """`y` times all of `scales`, in its own type."""
    for scale in scales:
        y = (scale * y).to(y.dtype)
    return y


class AbstractAddend(ABC):
    """What `+`, `-` and `*` combine: terms, with functions of t and x."""

    @abstractmethod
    def _sum(self, parts: Sequence[Part]) -> Any: ...

    def __add__(self, other: Any) -> Any:
        return self._sum([_whole(self), _whole(other)]) if callable(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, int) and other == 0:  # with which Python's `sum` begins
            return self
        return self._sum([_whole(other), _whole(self)]) if callable(other) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        return self._sum([_whole(self), (-1.0, (), other)]) if callable(other) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return -self + other if callable(other) else NotImplemented

    def __neg__(self) -> Any:
        return self._sum([(-1.0, (), self)])

    def scaled(self, scale: Scale) -> Any:
        """`scale · f`, which `*` writes; torch.compile takes `*` with a tensor for its own.

        Raises:
            TypeError: the scale is neither a float nor a floating tensor.
        """
        check_scale("term", "scale", scale)
        if isinstance(scale, Tensor):
            return self._sum([(1.0, (scale,), self)])
        return self._sum([(scale, (), self)])

    def __mul__(self, scale: Scale) -> Any:
        return self.scaled(scale) if isinstance(scale, Tensor | float | int) else NotImplemented

    __rmul__ = __mul__


def _whole(term: Any) -> Part:
    return 1.0, (), term


def check_field(f: Tensor, x: Tensor, given: str = "integrate: `term`") -> Tensor:
    """`f`, which is like `x`; of any float type where autocast brings them to one.

    given: what returned it, for messages.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(f, Tensor):
        got = type(f).__name__
        raise TypeError(f"{given} must return f as a Tensor, got {got}.")
    is_other_type = f.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)
    if f.shape != x.shape or is_other_type:
        raise ValueError(
            f"{given} must return f like x, {x.dtype} {list(x.shape)}, "
            f"got {f.dtype} {list(f.shape)}."
        )
    if f.device != x.device:
        raise ValueError(
            f"{given} must return f where x is, on {x.device}, got {f.device}. "
            "Move it with .to(x.device)."
        )
    return f
