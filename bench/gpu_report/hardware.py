"""The GPUs of the model, in their SXM form with 80 GB, and how many programs they hold at once.

Sources: multiprocessors, clock (boost), memory bandwidth and L2 size are NVIDIA's data sheets and
the whitepapers "NVIDIA A100 Tensor Core GPU Architecture" and "NVIDIA H100 Tensor Core GPU
Architecture"; limits of a multiprocessor, and results per cycle of each kind of instruction, the
tables "Technical Specifications per Compute Capability" and "Throughput of Native Arithmetic
Instructions" of the CUDA C++ Programming Guide. Three numbers are less certain:

- L2 bandwidth: three quarters of 5,120 bytes a cycle, which the A100 whitepaper gives as the peak
  (nothing is published for H100; taken as the same).
- L2 capacity: half of its size. Both halves of the cache keep a copy of what multiprocessors of
  both sides read (GTC 2021, S33322, "Dissecting the Ampere GPU Architecture").
- Latencies: round numbers for a loaded memory. Microbenchmarks of an idle one find less (arXiv
  2208.11174, 2402.13499).
"""

from dataclasses import dataclass

from bench.gpu_report.compile import Resources

_REGISTERS = 65_536
_REGISTER_UNIT = 256  # a warp's registers are handed out in units of so many
_SCHEDULERS = 4  # each with a quarter of registers and warps
_RESERVED_SHARED = 1024  # bytes of every program, for the system


@dataclass(frozen=True)
class Gpu:
    """One GPU; latencies in cycles, `fp32_lanes` a cycle and multiprocessor."""

    name: str
    multiprocessors: int
    clock_hz: float
    dram_bytes_per_s: float
    l2_bytes: float
    fp32_lanes: int
    shared_bytes: int
    l2_latency: float
    dram_latency: float
    warps: int = 64
    programs: int = 32

    @property
    def l2_bytes_per_s(self) -> float:
        """What a gather can hope for."""
        return 0.75 * 5120 * self.clock_hz

    @property
    def l2_capacity(self) -> float:
        """Bytes that it holds of what every multiprocessor reads."""
        return self.l2_bytes / 2


GPUS = {
    "sm_80": Gpu(
        "A100", multiprocessors=108, clock_hz=1.41e9, dram_bytes_per_s=2.039e12, l2_bytes=40e6,
        fp32_lanes=64, shared_bytes=164 * 1024, l2_latency=260, dram_latency=560,
    ),
    "sm_90": Gpu(
        "H100", multiprocessors=132, clock_hz=1.755e9, dram_bytes_per_s=3.35e12, l2_bytes=50e6,
        fp32_lanes=128, shared_bytes=228 * 1024, l2_latency=270, dram_latency=700,
    ),
}  # fmt: skip


def resident_programs(used: Resources, gpu: Gpu) -> int:
    """Programs of a kernel that one multiprocessor holds at once."""
    per_warp = -(-used.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    warps = min(gpu.warps, _REGISTERS // _SCHEDULERS // max(1, per_warp) * _SCHEDULERS)
    by_shared = gpu.shared_bytes // (used.shared + _RESERVED_SHARED)
    return min(gpu.programs, warps // used.warps, by_shared)
