"""Plain threads that run a kernel together.

Plain, because the kernel runs without the GIL: no OpenMP runtime of our own to clash with torch's
or to break in a forked child, and callers need no lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

_CORES = os.cpu_count() or 1  # once: a look takes as long as a small kernel
KernelFunction = Callable[[int, int], None]  # of the address of its arguments, and the thread


def run_on_threads(
    threads: int, function: KernelFunction, address: int, *, kept_alive: object
) -> None:
    """`function(address, t)` for each thread `t`, of which the caller is number 0.

    Tasks within the kernel go to whoever is free, so that fewer helpers, or none, do as well.
    `kept_alive` is what the address leads to.
    """
    jobs = [_Job(function, address, t, kept_alive) for t in range(1, threads)]
    try:
        for job in jobs:
            _hand_out(job)
        function(address, 0)
    finally:
        for job in jobs:
            job.finish()


class _Job:
    """One helper's share of a launch. What its address leads to lives as long as the job does.

    Bare locks, because an exception may come at any time from a signal (Ctrl-C), and those of
    `concurrent.futures` may then stay locked for good.
    """

    def __init__(
        self, function: KernelFunction, address: int, thread: int, kept_alive: object
    ) -> None:
        self._function, self._address, self._thread = function, address, thread
        self._kept_alive = kept_alive
        self._unclaimed, self._running = threading.Lock(), threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """By the helper: unless it was called off."""
        if self._unclaimed.acquire(blocking=False):
            self._function(self._address, self._thread)
            self._running.release()

    def finish(self) -> None:
        """By the caller: call it off if it has not started, else wait for its end."""
        if self._unclaimed.acquire(blocking=False):
            self._kept_alive = None  # it may lie in the queue until a helper is free
        else:
            self._running.acquire()


def _hand_out(job: _Job) -> None:
    """To a helper that is free; as many are started as there are cores."""
    if len(_helpers) < _CORES:
        helper = threading.Thread(target=_help, args=(_jobs,), name="grand_fast", daemon=True)
        # The interpreter is ending, or the system has no more threads: the caller does all tasks.
        with suppress(RuntimeError):
            helper.start()
            _helpers.append(helper)
    _jobs.put(job)


def _help(jobs: SimpleQueue[_Job]) -> None:
    while True:
        jobs.get().run()


def _forget_helpers() -> None:
    global _jobs, _helpers
    _jobs, _helpers = SimpleQueue(), []


_jobs: SimpleQueue[_Job]
_helpers: list[threading.Thread]
_forget_helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)  # a child has none of its parent's threads
