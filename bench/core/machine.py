"""The machine: what it is, its bandwidth in a copy and in a gather of rows, its arithmetic peak."""

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import numpy as np
import psutil
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from bench.core.harness import timed
from grand_fast import Graph
from grand_fast.kernels.cpu.language import FORMATS, Kernel
from grand_fast.kernels.cpu.math import fma
from grand_fast.kernels.cpu.rows import Compiled, Work
from grand_fast.ops.backends import plan

COPY_BYTES = 256 * 2**20  # several times the last-level cache, read once and written once
CACHE_LINE_FLOATS = 16
PREFETCH_ROWS = 16  # ahead: the fastest of 2, 4, 8, 16 at 64 to 256 channels; twice none at all
GATHER_PART_EDGES = 8192  # a part takes 0.1 ms, many times what handing it out does
MULTIPLY_ADD_FLOPS = 12 * 2**28  # some 10 ms on two cores; ACCUMULATORS divide it
MULTIPLY_ADD_TASKS = 512  # each some 50 µs, so that threads finish together
# Enough to hide the latency of a multiply-add, few enough to stay in registers: twelve suit
# registers of 64 bytes, six, of several registers each, narrower ones.
ACCUMULATORS = (6, 12)
PACKAGES = ("torch", "torch-geometric", "llvmlite", "numba", "numpy", "triton")


class DoesNotFitError(Exception):
    """A size is refused before its work starts; the text has the bytes needed and available."""


def header(arguments: list[str]) -> dict[str, Any]:
    """Where, with what and by which command a file of results was made."""
    return {
        "device": "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | _versions(),
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
    """One row-gather floor: every cache line of `x[col[e]]` read, `x [N, width]`, in Numba.

    Nothing is computed or written. This is the least that a pass over the edges has to do, rows
    taken by number, or `in_order`, as our kernels visit them.
    """
    # Rows padded to whole cache lines: the floor is that of the lines, whatever the width.
    lines = -(-width // CACHE_LINE_FLOATS)
    x = torch.ones(graph.num_nodes * lines * CACHE_LINE_FLOATS).numpy()
    col = (graph.csr(plan("cpu")) if in_order else graph).col.numpy()
    n_parts = max(1, graph.num_edges // GATHER_PART_EDGES)
    bounds = np.linspace(0, graph.num_edges, n_parts + 1).astype(np.int64)
    kernel = _gather_kernel(lines)

    def call() -> None:
        # Parts go to whichever thread is free, so that a busy core does not hold up the other.
        parts = iter(range(n_parts))

        def work() -> None:
            for part in parts:  # `next` of a range is atomic under the GIL
                kernel(x, col, bounds[part], bounds[part + 1])

        helpers = min(torch.get_num_threads(), n_parts) - 1
        threads = [threading.Thread(target=work) for _ in range(helpers)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()

    return call


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
    kernel = _multiply_add_kernel(accumulators)
    work = _tasks(MULTIPLY_ADD_TASKS)
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


def _tasks(count: int) -> Work:
    """A list of work with that many parts, of no rows."""
    bare = Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), 1)
    work: Work = bare.csr(plan("cpu")).work
    return replace(work, bounds=torch.arange(count + 1))


@intrinsic
def _prefetch(context: Any, x: Any, i: Any) -> Any:
    """`llvm.prefetch` of the cache line of `x[i]`, for reading, to be kept."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.gep(array.data, [arguments[1]])
        address = builder.bitcast(address, ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(x, types.int64), generate


@lru_cache(maxsize=16)
def _gather_kernel(lines: int) -> Callable[..., float]:
    """Compiled for one row length, so that the loop over its cache lines is unrolled."""
    width = lines * CACHE_LINE_FLOATS

    @numba.njit(nogil=True)
    def gather(x: NDArray[np.float32], col: NDArray[np.int32], start: int, stop: int) -> float:
        last = len(col) - 1
        even = odd = np.float32(0)  # two chains of additions, or their latency would be the floor
        for e in range(start, stop):
            ahead = np.int64(col[min(e + PREFETCH_ROWS, last)]) * width
            here = np.int64(col[e]) * width
            for line in range(lines):
                _prefetch(x, ahead + line * CACHE_LINE_FLOATS)
            for line in range(0, lines, 2):
                even += x[here + line * CACHE_LINE_FLOATS]
            for line in range(1, lines, 2):
                odd += x[here + line * CACHE_LINE_FLOATS]
        return even + odd

    return gather


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
