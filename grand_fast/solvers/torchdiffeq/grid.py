"""The grid of an `odeint` call by a method with fixed steps, as torchdiffeq rounds it."""

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from grand_fast.solvers.torchdiffeq.problem import Problem

# Points that are computed together
_PIECE = 2**15
# Points that a float64 can count
_MOST_POINTS = 2**53


def grid_of(problem: Problem, step_size: Any, constructor: Any) -> "ListedGrid | SteppedGrid":
    """The ends of the steps, in the type of the times.

    Raises:
        ValueError: both options, or a step size that gives no grid.
        AssertionError: the constructor's grid has other ends than the times.
    """
    t, operator = problem.t, problem.operator
    if step_size is None and constructor is None:
        return ListedGrid(t)
    if step_size is None:
        there, sign = t.to(problem.x0.device), problem.sign
        points = (sign * constructor(problem.term, problem.x0, sign * there)).cpu()
        assert points[0] == t[0] and points[-1] == t[-1], (
            f"{operator}: the grid of `grid_constructor` must begin at t[0] and end at t[-1]."
        )
        return ListedGrid(points)
    if constructor is not None:
        raise ValueError(f"{operator}: `step_size` and `grid_constructor` exclude each other.")
    length = float(step_size)
    if not length > 0:
        raise ValueError(f"{operator}: `step_size` must be above 0, got {length}.")
    count = float(torch.ceil((t[-1] - t[0]) / length + 1))
    if not count < _MOST_POINTS:
        name = str(t.dtype).removeprefix("torch.")
        raise ValueError(
            f"{operator}: `step_size` must make as many steps as {name} can count, got {length}. "
            "Use a longer step, or times of float64."
        )
    return SteppedGrid(t, length, int(count))


class ListedGrid:
    """Points that are given one by one: the times themselves, or those of a constructor."""

    def __init__(self, points: Tensor) -> None:
        self._points: list[float] = points.tolist()
        # Rounding may put the last point but one at the end, or past it.
        end, inner = self._points[-1], self._points[1:]
        self._last = next((i for i, t in enumerate(inner, 1) if t >= end), 0)

    def __getitem__(self, i: int) -> float:
        return self._points[i]

    def reaching(self, t: float) -> int:
        """Number of the first point that is not before `t`."""
        return bisect_left(self._points, t, 0, self._last)


class SteppedGrid:
    """`start + i · step_size` and the end, in the type of the times.

    Computed piece by piece when they are asked for: there may be more than there is memory.
    """

    def __init__(self, times: Tensor, step_size: float, count: int) -> None:
        self._start, self._end = times[0], float(times[-1])
        self._step_size, self._count = step_size, count
        self._piece: tuple[int, list[float]] = (-1, [])
        # As above, of points that rise but for the last
        self._last = bisect_left(range(count - 1), self._end, key=self._inner)

    def __getitem__(self, i: int) -> float:
        return self._end if i == self._count - 1 else self._in_piece(i)

    def reaching(self, t: float) -> int:
        """Number of the first point that is not before `t`."""
        return bisect_left(range(self._last), t, key=self._inner)

    def _inner(self, i: int) -> float:
        """A point before the last, looked at out of turn."""
        return self._in_piece(i) if self._count <= _PIECE else float(self._points(i, i + 1))

    def _in_piece(self, i: int) -> float:
        number, offset = divmod(i, _PIECE)
        if number != self._piece[0]:
            first = number * _PIECE
            self._piece = number, self._points(first, min(first + _PIECE, self._count)).tolist()
        return self._piece[1][offset]

    def _points(self, first: int, end: int) -> Tensor:
        counts = torch.arange(first, end, dtype=self._start.dtype)
        return counts * self._step_size + self._start
