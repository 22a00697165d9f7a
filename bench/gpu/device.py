"""A GPU under measurement: its clock, its caches, its memory; and the time that is left."""

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.core.harness import Timing
from bench.core.report import Row

Call = Callable[[], object]
_COPY_BYTES = 1 << 30  # several times any L2
_GATHERED_ROWS = 1 << 21
_MIN_ROUNDS = 5


class Device(Protocol):
    """What the suite asks of a device; tests have one without a GPU."""

    device: torch.device
    backend: str  # of grand-fast
    arch: str  # as the GPU report names it: sm_80

    def header(self) -> Row:
        """What it is."""

    def seconds(self, call: Call) -> float:
        """Of one call, its caches cold."""

    def peak_bytes(self, call: Call) -> int:
        """Memory that a call takes at most, above what is there before."""

    def free_bytes(self) -> int:
        """Memory that is free now."""


class Cuda:
    """The current CUDA (or ROCm) device."""

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
            "driver": _driver(),
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


class Budget:
    """Seconds for the whole suite, and what there was no time for."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for it; if not, it is noted."""
        if self.left > seconds:
            return True
        self.left_out.append(what)
        return False


def interleave(
    calls: dict[str, Call], device: Device, *, rounds: int, budget_s: float
) -> dict[str, Timing]:
    """Time all calls in turn, round by round; they have run before.

    There are fewer rounds, but five, if they would take longer than `budget_s`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start = time.monotonic()
    for r in range(rounds):
        for name, call in calls.items():
            seconds[name].append(device.seconds(call))
        spent = time.monotonic() - start
        if r + 1 >= _MIN_ROUNDS and spent * (r + 2) / (r + 1) > budget_s:
            break
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def rates(device: Device, width: int, *, scale: float = 1.0) -> dict[str, float]:
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
    for call in calls.values():
        call()
    timings = interleave(calls, device, rounds=10, budget_s=5.0)
    moved = {"copy": 2 * source.nbytes, "gather": 2 * table.nbytes + index.nbytes}
    return {f"{n}_gb_per_s": moved[n] / timings[n].median / 1e9 for n in calls}


def to_device(values: Iterable[Tensor], device: Device, dtype: torch.dtype) -> list[Tensor]:
    """Copies on the device."""
    return [value.to(device.device, dtype) for value in values]


def _driver() -> str | None:
    try:
        from torch._C import _cuda_getDriverVersion as version  # type: ignore[attr-defined]
    except ImportError:
        return None
    value: Any = version()
    return str(value)
