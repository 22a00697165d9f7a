"""What a solve returns: the final state, what it cost, and whether it can be trusted."""

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from grand_fast.solvers._term import CountedTerm


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
    """Work of one solve: evaluations of f in the forward pass, accepted and rejected steps."""

    nfe: int
    accepted: int
    rejected: int


def checksum(x: Tensor) -> Tensor:
    """A scalar that is not finite if an element of `x` is not.

    One read of `x`; `isfinite(x).all()` would write a mask of its size first. In float32 or wider,
    so that only values near its limit could be mistaken.
    """
    return x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))


def status_of(total: Tensor) -> Status:
    """The status of a solve whose final state has this `checksum`."""
    return Status.SUCCESS if bool(torch.isfinite(total)) else Status.NON_FINITE


@dataclass(frozen=True, eq=False)
class Solution:
    """The final state and what it took.

    x:      the state at `t`; after a failure, the last one that counted.
    stats:  the work.
    t:      the time reached: `T`, or where the solve failed.
    xs:     the states at the `times` asked for, `[len(times), …]`; None if none were. After a
            failure, those from `t` on are NaN.
    penalties: of each regulariser its integral to `t` by node, `[N]`, differentiable.
    """

    x: Tensor
    stats: Stats
    t: float
    xs: Tensor | None = None
    penalties: dict[str, Tensor] = field(default_factory=dict)
    _ended: Status = field(default=Status.SUCCESS, repr=False)
    _term: CountedTerm | None = field(default=None, repr=False)
    _nfe: int = field(default=0, repr=False)  # the term's evaluations when the solve ended

    @property
    def nfe_backward(self) -> int:
        """Evaluations of f since the solve ended: those of backward, once it has run."""
        return 0 if self._term is None else self._term.nfe - self._nfe

    @property
    def status(self) -> Status:
        """`SUCCESS`, or why the state cannot be used; reads one value from the device."""
        return self._ended if self._ended is not Status.SUCCESS else status_of(checksum(self.x))

    def check(self) -> "Solution":
        """Itself if the solve succeeded.

        Raises:
            RuntimeError: the status, the time reached and what to try.
        """
        status = self.status
        if status is not Status.SUCCESS:
            raise RuntimeError(f"integrate: {status.name} at t = {self.t:g}: {status.value}.")
        return self
