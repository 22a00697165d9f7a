"""A GPU under measurement: its clock, its caches, its memory, its bandwidths."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from bench.core.harness import interleave
from bench.core.tables import Row

Call = Callable[[], object]
_COPY_BYTES = 1 << 30  # several times any L2
_GATHERED_ROWS = 1 << 21
_MIN_ROUNDS = 5


class Cuda:
    """The current CUDA (or ROCm) device; tests have one with the same methods without a GPU.

    backend: of grand-fast. arch: as the GPU report names it, `sm_80`.
    """

    backend = "gpu"

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        major, minor = torch.cuda.get_device_capability(self.device)
        is_hip = torch.version.hip is not None
        self.arch = self._properties.gcnArchName if is_hip else f"sm_{major}{minor}"
        # Twice the L2, so that nothing of a call's inputs is left in it.
        size = max(2 * getattr(self._properties, "L2_cache_size", 0), 64 << 20)
        self._flush = torch.empty(size, dtype=torch.int8, device=self.device)

    def header(self) -> Row:
        """Name, compute capability, memory, and the versions beneath torch."""
        return {
            "device": self._properties.name,
            "arch": self.arch,
            "multiprocessors": self._properties.multi_processor_count,
            "device_memory_bytes": self._properties.total_memory,
            "l2_bytes": getattr(self._properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            # not there in a torch without CUDA
            "driver": getattr(torch._C, "_cuda_getDriverVersion", lambda: None)(),
        }

    def seconds(self, call: Call) -> float:
        """Between two events around a call. The flush before it keeps the device busy meanwhile."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) / 1e3

    def peak_bytes(self, call: Call) -> int:
        """By the caching allocator, reset before the call."""
        self._clear()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def free_bytes(self) -> int:
        """After what the allocator keeps for later is given back."""
        self._clear()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def _clear(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


def clock(device: Cuda) -> dict[str, Any]:
    """How `interleave` times calls there: by its events, before which nothing has to rest."""
    return {"clock": device.seconds, "pause_s": 0.0, "min_rounds": _MIN_ROUNDS}


def rates(device: Cuda, width: int, *, scale: float = 1.0) -> dict[str, float]:
    """Bandwidths of this device in this run, GB/s: of a copy, and of a gather of random rows.

    `width`: columns of a row, float32. `scale` shrinks both, for a device that is no GPU.
    """
    source = torch.ones(int(scale * _COPY_BYTES) // 4, device=device.device)
    target = torch.empty_like(source)
    rows = max(1, int(scale * _GATHERED_ROWS))
    index = torch.randint(0, rows, (rows,), device=device.device)
    table = torch.ones(rows, width, device=device.device)
    gathered = torch.empty_like(table)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "gather": lambda: torch.index_select(table, 0, index, out=gathered),
    }
    timings = interleave(calls, rounds=10, budget_s=2.5, **clock(device))
    moved = {"copy": 2 * source.nbytes, "gather": 2 * table.nbytes + index.nbytes}
    return {f"{n}_gb_per_s": moved[n] / timings[n].median / 1e9 for n in calls}
