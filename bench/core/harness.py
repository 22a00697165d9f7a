"""Timing: warm-up, interleaved rounds, median and spread."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

# A slow call takes part in fewer of the rounds, but in at least these.
MIN_ROUNDS = 3
# After a call, OpenMP's threads spin for some ms, at the expense of whatever comes next.
PAUSE_S = 0.01


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


def interleave(
    calls: dict[str, Callable[[], object]],
    *,
    rounds: int,
    budget_s: float = 20.0,
    repeats: Mapping[str, int] = MappingProxyType({}),
    tick: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Time all calls in rounds, so that a slow spell of the machine strikes them all alike.

    Each is called once first, to warm up; its rounds are cut, and spread over the run, if they
    would take longer than `budget_s`. Where `repeats` names a number, that many calls are made in
    a row and their median counts: for a call too short to be timed alone. `tick` is told the name
    of each call before it starts.
    """
    gc.collect()
    take = {}
    for name, call in calls.items():
        tick(name)
        one = repeats.get(name, 1) * timed(call)
        take[name] = min(rounds, max(MIN_ROUNDS, int(budget_s / max(one, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds):
        for name, call in calls.items():
            if r * take[name] // rounds != (r + 1) * take[name] // rounds:
                tick(name)
                time.sleep(PAUSE_S)
                few = [timed(call) for _ in range(repeats.get(name, 1))]
                seconds[name].append(float(np.median(few)))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
