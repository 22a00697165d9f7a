"""The machine: what it is, its bandwidth in a copy and in a gather of rows, its arithmetic peak."""

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.core.harness import timed
from grand_fast import Graph
from grand_fast.kernels.cpu.language import FORMATS, Kernel
from grand_fast.kernels.cpu.math import fma
from grand_fast.kernels.cpu.rows import Compiled, slabs
from grand_fast.ops.backends import plan
from grand_fast.training.environment import processor, version_of, versions

COPY_BYTES = 256 * 2**20  # several times the last-level cache, read once and written once
CACHE_LINE_FLOATS = 16
PREFETCH_ROWS = 16  # ahead: the fastest of 2, 4, 8, 16 at 64 to 256 channels; twice none at all
GATHER_PART_EDGES = 8192  # a part takes 0.1 ms, many times what handing it out does
MULTIPLY_ADD_FLOPS = 12 * 2**28  # some 10 ms on two cores; ACCUMULATORS divide it
MULTIPLY_ADD_TASKS = 512  # each some 50 µs, so that threads finish together
# Enough to hide the latency of a multiply-add, few enough to stay in registers: twelve suit
# registers of 64 bytes, six, of several registers each, narrower ones.
ACCUMULATORS = (6, 12)
# Of mallopt: M_MMAP_MAX, nothing is mapped by itself; M_TRIM_THRESHOLD, nothing is trimmed;
# M_TOP_PAD, memory comes in steps of 64 MiB.
_KEEP = ((-4, 0), (-1, -1), (-2, 64 << 20))


class DoesNotFitError(Exception):
    """A size is refused before its work starts; the text has the bytes needed and available."""


def header(arguments: list[str]) -> dict[str, Any]:
    """Where, with what and by which command a file of results was made."""
    return {
        "device": "cpu",
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "versions": versions() | {"numba": version_of("numba")},
        "commit": _commit(),
        "command": " ".join(["python", "-m", "bench", *arguments]),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def require_memory(what: str, needed: int) -> None:
    """Raise `DoesNotFitError` unless `needed` bytes are available now."""
    give_back_memory()
    available = psutil.virtual_memory().available
    if needed > available:
        raise DoesNotFitError(
            f"{what}: needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available."
        )


def keep_memory() -> bool:
    """Have the C library keep the memory of freed tensors; whether it does.

    By default it maps a large one anew each time, whose fresh pages cost more than what is done
    with them: up to half of a peer's time, where our engine keeps its own.
    """
    with contextlib.suppress(OSError, AttributeError):  # not the GNU C library
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(option, value) for option, value in _KEEP)
    return False


def give_back_memory() -> None:
    """What was freed, but not yet given back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not the GNU C library
        ctypes.CDLL(None).malloc_trim(0)


def copy_call() -> Callable[[], object]:
    """A copy of `COPY_BYTES`; it moves twice as many."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def gather_call(graph: Graph, width: int, *, in_order: bool = False) -> Callable[[], object]:
    """One row-gather floor: every cache line of `x[col[e]]` read, `x [N, width]`.

    Nothing is computed or written but a sum. This is the least that a pass over the edges has to
    do, rows taken by number, or `in_order`, as our kernels visit them.
    """
    # Rows padded to whole cache lines: the floor is that of the lines, whatever the width.
    lines = -(-width // CACHE_LINE_FLOATS)
    x = torch.ones(graph.num_nodes, lines * CACHE_LINE_FLOATS)
    col = (graph.csr(plan("cpu")) if in_order else graph).col
    kernel, work = _gather_kernel(lines), slabs(graph.num_edges, GATHER_PART_EDGES)
    total, last = torch.empty(len(work.bounds), CACHE_LINE_FLOATS), graph.num_edges - 1
    return lambda: kernel(work, pieces=False, x=x, col=col, total=total, last_edge=last)


def gather_bytes(graph: Graph, width: int) -> int:
    """Bytes of the rows that one `gather_call` reads, a row as often as edges name it."""
    lines = -(-width // CACHE_LINE_FLOATS)
    return graph.num_edges * lines * CACHE_LINE_FLOATS * 4


def multiply_add_call() -> Callable[[], object]:
    """`MULTIPLY_ADD_FLOPS` of fused multiply-adds in float32, in registers alone, on all threads.

    No product of matrices can do its arithmetic in less time.
    """
    calls = [_multiply_adds(accumulators) for accumulators in ACCUMULATORS]
    return min(calls, key=lambda call: min(timed(call) for _ in range(3)))


def _multiply_adds(accumulators: int) -> Callable[[], object]:
    kernel, work = _multiply_add_kernel(accumulators), slabs(MULTIPLY_ADD_TASKS, 1)
    lanes = FORMATS[torch.float32].lanes
    factor, total = torch.ones(lanes), torch.empty(MULTIPLY_ADD_TASKS, lanes)
    steps = MULTIPLY_ADD_FLOPS // (MULTIPLY_ADD_TASKS * accumulators * 2 * lanes)
    return lambda: kernel(work, pieces=False, factor=factor, total=total, steps=steps)


@lru_cache
def _multiply_add_kernel(accumulators: int) -> Compiled:
    k = Kernel("multiply_add_peak", torch.float32, torch.int32)
    factor, total = k.vector("factor").load(), k.matrix("total")
    with k.tasks() as task:
        sums = [k.variable(k.splat(float(i))) for i in range(accumulators)]
        with k.loop(0, k.number("steps")):
            for s in sums:
                s.value = fma(factor, factor, s.value)
        result = sums[0].value
        for s in sums[1:]:
            result = result + s.value
        total.row(task).store(result)  # or the compiler would leave it all out
    return Compiled(k)


@lru_cache(maxsize=16)
def _gather_kernel(lines: int) -> Compiled:
    """Compiled for one row length, so that the loop over its cache lines is unrolled."""
    k = Kernel("gather_rows", torch.float32, torch.int32)
    x, col, bounds = k.matrix("x"), k.indices("col"), k.longs("bounds")
    with k.tasks() as task:
        # two chains of additions, or their latency would be the floor
        sums = [k.variable(k.splat(0.0)) for _ in range(2)]
        with k.loop(bounds[task], bounds[task + 1]) as e:
            ahead = (e + PREFETCH_ROWS).minimum(k.number("last_edge"))
            x.row(col[ahead]).prefetch(lines * CACHE_LINE_FLOATS)
            row = x.row(col[e])
            for line in range(lines):
                s = sums[line % 2]
                s.value = s.value + row.at(line * CACHE_LINE_FLOATS).load()
        k.matrix("total").row(task).store(sums[0].value + sums[1].value)
    return Compiled(k)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
