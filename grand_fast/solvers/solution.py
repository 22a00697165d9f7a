"""What a solve returns: the final state, what it cost, and whether it can be trusted."""

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from grand_fast.solvers.term import Counter


class SolveError(RuntimeError):
    """A solve failed where that cannot be a status: in `Solution.check`, or in backward."""


class Status(Enum):
    """How a solve ended; the value says what to try."""

    SUCCESS = "the solve reached T"
    STEP_TOO_SMALL = (
        "the step fell below the resolution of t: try larger tolerances (rtol, atol or tol_scale), "
        "float64, or a smaller learning rate; f may have a discontinuity there"
    )
    MAX_STEPS = (
        "the solve took as many steps or evaluations as it was allowed: try a larger max_steps or "
        "max_nfe, larger tolerances, or semi_implicit_euler, which no stiffness slows down"
    )
    NON_FINITE = (
        "the state is not finite: try a smaller step_size (explicit methods are stable for "
        "step_size · alpha up to 1 with Euler, 1.39 with rk4), semi_implicit_euler, a smaller "
        "learning rate, and inputs without NaN"
    )


@dataclass(frozen=True)
class Stats:
    """Work of one solve: evaluations of f in the forward pass, accepted and rejected steps.

    adjoint: how it will be differentiated: `"direct"` if every step keeps what it saves,
        `"checkpoint"` if one does not, `"continuous"`; None under `torch.no_grad()`. Stats of
        equal work are equal.
    """

    nfe: int
    accepted: int
    rejected: int
    adjoint: str | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a solve went, without its states: it may be kept when they are gone.

    stats:  the work.
    t:      the time reached, as in `Solution`.
    """

    stats: Stats
    t: float
    _ended: Status
    _checksum: Tensor
    _counter: Counter
    _nfe: int  # evaluations when the solve ended

    @property
    def nfe_backward(self) -> int:
        """Evaluations of f since the solve ended: those of backward, once it has run."""
        return self._counter.nfe - self._nfe

    @property
    def status(self) -> Status:
        """`SUCCESS`, or why the state cannot be used; reads one value from the device."""
        if self._ended is Status.SUCCESS and not bool(torch.isfinite(self._checksum)):
            return Status.NON_FINITE
        return self._ended

    @property
    def failure(self) -> str | None:
        """Status, time reached and what to try; None of a success. Reads like `status`."""
        status = self.status
        if status is Status.SUCCESS:
            return None
        # Fixed steps read no value on their way: that the state is not finite shows at its end
        when = " or before" if self._ended is Status.SUCCESS else ""
        return f"{status.name} at t = {self.t:g}{when}: {status.value}"


@dataclass(frozen=True, eq=False)
class Solution:
    """The final state and what it took.

    x:      the state at `t`; after a failure, the last one that counted.
    stats:  the work.
    t:      the time reached: `T`, or where the solve failed. With methods that choose no steps a
            state that is not finite is found at `T` alone, and is `x`: `.xs` tells more.
    xs:     the states at the `times` asked for, `[len(times), …]`; None if none were. After a
            failure, those after `t` are NaN.
    penalties: of each regulariser its integral to `t` by node, `[N]`, differentiable.
    """

    x: Tensor
    stats: Stats
    t: float
    xs: Tensor | None = None
    penalties: dict[str, Tensor] = field(default_factory=dict)
    _ended: Status = field(default=Status.SUCCESS, repr=False)
    _counter: Counter = field(default_factory=Counter, repr=False)
    _nfe: int = field(default=0, repr=False)  # evaluations when the solve ended

    @property
    def outcome(self) -> Outcome:
        """How it went, without the states."""
        total = _checksum(self.x)
        return Outcome(self.stats, self.t, self._ended, total, self._counter, self._nfe)

    @property
    def nfe_backward(self) -> int:
        """Evaluations of f since the solve ended: those of backward, once it has run."""
        return self._counter.nfe - self._nfe

    @property
    def status(self) -> Status:
        """`SUCCESS`, or why the state cannot be used; reads one value from the device."""
        return self.outcome.status

    def check(self) -> "Solution":
        """Itself if the solve succeeded.

        Raises:
            SolveError: the status, the time reached and what to try.
        """
        if failure := self.outcome.failure:
            raise SolveError(f"integrate: {failure}.")
        return self


def _checksum(x: Tensor) -> Tensor:
    """A scalar that is not finite if an element of `x` is not.

    One read of `x`; `isfinite(x).all()` would write a mask of its size first. In float32 or wider,
    so that only values near its limit could be mistaken.
    """
    return x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
