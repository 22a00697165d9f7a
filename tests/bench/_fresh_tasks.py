"""What `test_peak_memory_in_a_fresh_process` runs there: little has to be imported for it."""

import resource

import torch

from bench.core import machine
from bench.core.fresh import peak


def peak_of_an_array(size: int) -> dict[str, float]:
    return peak(lambda: torch.ones(size, dtype=torch.uint8))


def broken() -> dict[str, float]:
    raise ValueError("out of luck")


def fresh_pages(*, keep: bool) -> dict[str, float]:
    """Of the pages of tensors that follow each other, those that are fresh from the system."""
    if keep:
        assert machine.keep_memory()
    n, turns = 1 << 24, 8  # 64 MiB: smaller ones the C library learns to keep
    for turn in range(2 * turns):
        if turn == turns:  # what an allocator keeps, it has by now
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(n).fill_(1.0)
    fresh = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"fresh": fresh, "all": turns * n * 4 / resource.getpagesize()}


EPILOG = "A suite that does nothing."


def run(options: object, report: object) -> None:
    pass
