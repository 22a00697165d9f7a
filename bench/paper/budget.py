"""A limit on the seconds that a part of the suite takes."""

from __future__ import annotations

import signal
import time
from types import FrameType

# The first signal can be lost in a callback whose exceptions are not passed on.
REPEAT_S = 10.0


class Budget:
    """Interrupts, by KeyboardInterrupt, what runs inside `with` when its seconds are over.

    As Ctrl-C does it: a training run stops after a whole epoch's state was saved. Main thread only.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether there is nothing left."""
        return self._end is not None and time.monotonic() >= self._end

    def __enter__(self) -> Budget:
        if self._end is not None:
            self._before = signal.signal(signal.SIGALRM, _interrupt)
            left = max(self._end - time.monotonic(), 1e-3)  # 0 would mean never
            signal.setitimer(signal.ITIMER_REAL, left, REPEAT_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self._end is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, self._before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
