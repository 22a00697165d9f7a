"""A model of the time of a gather kernel on a GPU. NOTHING HERE WAS MEASURED ON A GPU.

The time of a kernel is the longest of five, each as if the others cost nothing:

- DRAM: every tensor that the launch names moves once, and of gathered tables the rows that an LRU
  cache of L2's capacity misses (all tables of a row come and go together; programs run one after
  the other; writes and index arrays take no room).
- L2: every row of every gather, in sectors of 32 bytes. L1 catches nothing.
- Pipe: instructions of the loops times turns, and of the rest on its longest way times programs,
  through the busiest of issue, multiply-adds, integers, special functions, and loads with shuffles.
- Latency: a warp alone takes the cycles that the compiler's schedule and the scoreboards give
  (`sass.cycles`), and those resident run side by side. This is Little's law, with the loads in
  flight that the code allows. A turn waits for its slowest row: for DRAM unless all its rows hit.
- Longest piece: one program's cycles, on the piece with the most edges.

A GPU overlaps them, but not wholly: `added` is what memory and the longest of the other three take
one after the other, so the truth should lie between the two.

The floor is what no kernel of the same inputs avoids: the DRAM time, or that of L2 if each table
were gathered only once per edge. Launch overhead, joins of split rows, contention and the order of
programs are left out; the numbers rank kernels and bounds, and are no forecast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.gpu_report import sass
from bench.gpu_report.compile import Launch
from bench.gpu_report.hardware import GPUS, Gpu, resident_programs
from bench.gpu_report.locality import Reuse
from bench.gpu_report.metrics import FP, Kernel

# The tables that each gather loop of a kernel reads at the column index, loop by loop, those of
# the state if it is given.
GATHERED: Mapping[str, Sequence[tuple[str, ...]]] = {
    "_attention_diffusion_fwd_kernel": (("k",), ("k", "x")),
    "_attention_product_fwd_kernel": (("k", "v"),),
    "_attention_bwd_dq_kernel": (("k", "x"),),
    "_attention_bwd_dk_kernel": (("q", "df", "norm"),),
    "_csr_diffusion_fwd_kernel": (("x",),),
    "_csr_diffusion_bwd_da_kernel": (("x",),),
    "_spmm_fwd_kernel": (("x",),),
    "_spmm_bwd_da_kernel": (("x",),),
    "_edge_attention_fwd_norm_kernel": (("k",),),
    "_edge_attention_fwd_kernel": (("k",), ("k",)),
}
_AT_SLOT = ("a", "da")  # arrays over edges: scattered in a launch that has slots
_SECTOR = 32  # bytes: what L2 hands out
_L1_BYTES = 128  # a cycle and multiprocessor
_INTEGER = "I(?!MAD|DP)|LOP|SHF|LEA|SEL|FSEL|FSETP|FMNMX|PRMT|MOV|PLOP|P2R|R2P|SGXT|VOTE|F2FP"


@dataclass(frozen=True)
class Traffic:
    """Bytes of a launch. streamed: once. gathered: per missed row of every table together.

    gathered_l2: per edge, of all loops; gathered_once: the same if each table were read once.
    """

    streamed: float
    gathered: int
    gathered_l2: int
    gathered_once: int


@dataclass(frozen=True)
class Times:
    """Seconds, and the busiest pipe."""

    dram: float
    l2: float
    pipe: float
    latency: float
    longest: float
    floor: float
    busiest: str

    @property
    def bound(self) -> str:
        """Which of the five is the longest."""
        return max(("dram", "l2", "pipe", "latency", "longest"), key=lambda n: getattr(self, n))

    @property
    def seconds(self) -> float:
        """The time of the kernel, in this model: all five side by side."""
        return float(getattr(self, self.bound))

    @property
    def added(self) -> float:
        """The time if nothing overlapped memory: DRAM or L2, and then the longest of the others."""
        return max(self.dram, self.l2) + max(self.pipe, self.latency, self.longest)


def is_modelled(kernel: Kernel) -> bool:
    """Joins are not; nor is code whose gather loops are not those of `GATHERED`."""
    return len(gathered(kernel.launch)) == len(kernel.loops)


def gathered(launch: Launch) -> Sequence[tuple[str, ...]]:
    """The tables that each gather loop of a launch reads at the column index."""
    given, loops = launch.arguments, GATHERED.get(launch.name, ())
    if launch.kwargs.get("IS_ONE_SWEEP"):
        loops = (("x",),) if launch.kwargs.get("IS_ABSORBED") else loops[-1:]
    return [tuple(t for t in loop if given[f"{t}_ptr"] is not None) for loop in loops]


def traffic(launch: Launch) -> Traffic:
    """Bytes that a launch moves, from its arguments."""
    loops = gathered(launch)
    arguments = {
        name.removesuffix("_ptr"): value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor)
    }
    tables = {name for loop in loops for name in loop}
    piece_rows = arguments["piece_row"][: launch.grid[0]]
    n, e = len(arguments[loops[0][0]]), len(arguments["col"])
    rows, edges = len(np.unique(piece_rows.numpy())), int(_lengths(launch).sum())
    streamed = 0.0
    for name, value in arguments.items():
        size = float(value.numel() * value.element_size())
        if name in tables or (name == "k" and launch.kwargs.get("IS_ABSORBED")):
            continue
        if name.startswith("piece_"):
            size *= len(piece_rows) / len(value)
        elif len(value) == e:
            size *= edges / e
        elif len(value) == n:
            size *= rows / n
        streamed += size

    def row_bytes(names: Sequence[str]) -> int:
        """Of a row of each table, in whole sectors."""
        sizes = [
            t.numel() // len(t) * t.element_size() for t in (arguments[name] for name in names)
        ]
        return sum(-(-size // _SECTOR) * _SECTOR for size in sizes)

    scattered = row_bytes([name for name in _AT_SLOT if name in arguments])
    scattered *= "slot" in arguments
    once = row_bytes(sorted(tables))
    every = sum(row_bytes(loop) for loop in loops)
    return Traffic(streamed, once, every + scattered, once + scattered)


def times(kernel: Kernel, reuse: Reuse) -> Times:
    """The five times of a kernel on the graph of its launch, and the floor."""
    gpu, launch, warps = GPUS[kernel.arch], kernel.launch, kernel.used.warps
    moved, lengths = traffic(launch), _lengths(launch)
    programs, edges = len(lengths), int(lengths.sum())
    capacity = int(gpu.l2_capacity / moved.gathered)
    dram = moved.streamed + reuse.misses(capacity) * moved.gathered
    l2 = moved.streamed + edges * moved.gathered_l2
    l2_once = moved.streamed + edges * moved.gathered_once
    turns = -(-lengths // launch.slots)
    body = [instruction for code in kernel.loops for instruction in code]
    loop, rest = _pipes(body, gpu), _pipes(kernel.rest, gpu)
    pipes = {name: loop[name] * turns.sum() + rest[name] * programs for name in loop}
    busiest = max(pipes, key=lambda name: pipes[name])
    hit = (1 - reuse.miss_share(capacity)) ** launch.slots
    latency = hit * gpu.l2_latency + (1 - hit) * gpu.dram_latency
    turn = sum(sass.cycles(code, latency, turns=3) for code in kernel.loops)
    once = sass.cycles(kernel.rest, gpu.dram_latency)
    side_by_side = gpu.multiprocessors * resident_programs(kernel.used, gpu)
    return Times(
        dram=dram / gpu.dram_bytes_per_s,
        l2=l2 / gpu.l2_bytes_per_s,
        pipe=float(pipes[busiest]) * warps / gpu.multiprocessors / gpu.clock_hz,
        latency=float(turn * turns.sum() + once * programs) / side_by_side / gpu.clock_hz,
        longest=float(turn * turns.max(initial=0) + once) / gpu.clock_hz,
        floor=max(dram / gpu.dram_bytes_per_s, l2_once / gpu.l2_bytes_per_s),
        busiest=busiest,
    )


def _lengths(launch: Launch) -> NDArray[np.int64]:
    arguments, programs = launch.arguments, launch.grid[0]
    ends = arguments["piece_end_ptr"][:programs].long()
    lengths: NDArray[np.int64] = (ends - arguments["piece_beg_ptr"][:programs].long()).numpy()
    return lengths


def _pipes(code: sass.Code, gpu: Gpu) -> dict[str, float]:
    """Cycles of a multiprocessor that one warp's instructions take on each pipe."""
    moves = [i.bytes for i in code if i.is_load or i.opcode.startswith(("STG", "LDS", "STS"))]
    return {
        "issue": len(code) / 4,
        "multiply-add": sass.count(code, FP) * sass.LANES / gpu.fp32_lanes
        + sass.count(code, "IMAD|IDP") * sass.LANES / 64,
        "integer": sass.count(code, _INTEGER) * sass.LANES / 64,
        "special": sass.count(code, "MUFU|F2F|F2I|I2F") * sass.LANES / 16,
        "load/shuffle": sass.count(code, "SHFL")
        + sum(max(1, size * sass.LANES / _L1_BYTES) for size in moves),
    }
