"""Where the steps of a solve lie."""

import math
from collections.abc import Iterator

# A last step shorter than this share of the step size is rounding of T / step_size, not a step.
_ROUNDING = 1e-9


def fixed_steps(T: float, step_size: float | None) -> Iterator[tuple[float, float]]:
    """`(t, tau)` of each step from 0 to exactly `T`; the last may be shorter.

    `step_size=None` means one step over the whole interval, as in torchdiffeq.
    """
    if T == 0.0:
        return
    if step_size is None:
        yield 0.0, T
        return
    n = max(1, math.ceil(T / step_size - _ROUNDING))
    for step in range(n):
        t = step * step_size
        yield t, T - t if step == n - 1 else step_size
