"""What `test_peak_memory_in_a_fresh_process` runs there: little has to be imported for it."""

import torch

from bench.core.fresh import peak


def peak_of_an_array(size: int) -> dict[str, float]:
    return peak(lambda: torch.ones(size, dtype=torch.uint8))


def broken() -> dict[str, float]:
    raise ValueError("out of luck")
