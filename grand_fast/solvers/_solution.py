"""What a solve returns: the final state, what it cost, and whether it can be trusted."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Status(Enum):
    """How a solve ended; the value says what to try."""

    SUCCESS = "the solve reached T"
    NON_FINITE = (
        "the state is not finite: try a smaller step_size (explicit methods are stable for "
        "step_size · alpha up to 1 with Euler, 1.39 with rk4), a smaller learning rate, and inputs "
        "without NaN"
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
    """Final state `x`, `stats`, and the `status`, which reads one value from the device."""

    x: Tensor
    stats: Stats

    @property
    def status(self) -> Status:
        """`SUCCESS`, or why the state cannot be used."""
        return status_of(checksum(self.x))

    def check(self) -> "Solution":
        """Itself if the solve succeeded.

        Raises:
            RuntimeError: the status and what to try.
        """
        status = self.status
        if status is not Status.SUCCESS:
            raise RuntimeError(f"integrate: {status.name}: {status.value}.")
        return self
