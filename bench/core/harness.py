"""Timing: warm-up, interleaved rounds, median and spread; and a limit on the time of it all."""

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, MappingProxyType
from typing import Self

import numpy as np
import torch

# A slow call takes part in fewer of the rounds, but in at least these.
MIN_ROUNDS = 3
# After a call, OpenMP's threads spin for some ms, at the expense of whatever comes next.
PAUSE_S = 0.01
# Of a budget that interrupts: the first signal can be lost in a callback that passes no exception.
REPEAT_S = 10.0


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed call."""

    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Seconds, interpolated between the sorted calls."""
        return float(np.percentile(self.seconds, percent))

    @property
    def median(self) -> float:
        """Seconds."""
        return self.percentile(50)

    def record(self) -> dict[str, float]:
        """As it stands in JSON."""
        return {
            "median_s": self.median,
            "p10_s": self.percentile(10),
            "p90_s": self.percentile(90),
            "rounds": len(self.seconds),
        }


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch for a block, or for the function that this decorates."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    calls: dict[str, Callable[[], object]],
    *,
    rounds: int,
    budget_s: float = 20.0,
    min_rounds: int = MIN_ROUNDS,
    repeats: Mapping[str, int] = MappingProxyType({}),
    tick: Callable[[str], object] = lambda name: None,
    clock: Callable[[Callable[[], object]], float] = timed,
    pause_s: float = PAUSE_S,
) -> dict[str, Timing]:
    """Time all calls in rounds, so that a slow spell of the machine strikes them all alike.

    Each is called once first, to warm up; its rounds are cut, and spread over the run, if they
    would take longer than `budget_s`. Where `repeats` names a number, that many calls are made in
    a row and their median counts: for a call too short to be timed alone. `tick` is told the name
    of each call before it starts. `clock` takes the seconds of one call.
    """
    gc.collect()
    take = {}
    for name, call in calls.items():
        tick(name)
        one = repeats.get(name, 1) * clock(call)
        take[name] = min(rounds, max(min_rounds, int(budget_s / max(one, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds):
        for name, call in calls.items():
            if r * take[name] // rounds != (r + 1) * take[name] // rounds:
                tick(name)
                time.sleep(pause_s)
                few = [clock(call) for _ in range(repeats.get(name, 1))]
                seconds[name].append(float(np.median(few)))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


class Budget:
    """A limit on seconds, None for none: of a suite, or of a part of it.

    It is asked before each step; what it does not allow is noted in `left_out`. Inside `with` it
    interrupts, by KeyboardInterrupt, what runs when it is over, as Ctrl-C does: a training run
    stops after a whole epoch's state was saved. Main thread only.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()

    @property
    def over(self) -> bool:
        """Whether there is nothing left."""
        return self.left <= 0

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for it; if not, it is noted."""
        if self.left > seconds:
            return True
        self.left_out.append(what)
        return False

    def __enter__(self) -> Self:
        if self._end < math.inf:
            self._before = signal.signal(signal.SIGALRM, _interrupt)
            signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-3), REPEAT_S)  # 0 means never
        return self

    def __exit__(self, *_: object) -> None:
        if self._end < math.inf:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, self._before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
