"""The machine: what it is, and what its memory gives to a copy and to a gather of rows."""

import contextlib
import os
import platform
import subprocess
import threading
from collections.abc import Callable
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

from grand_fast import Graph

COPY_BYTES = 256 * 2**20  # several times the last-level cache, read once and written once
CACHE_LINE_FLOATS = 16
PREFETCH_ROWS = 16  # ahead: the fastest of 2, 4, 8, 16 at 64 to 256 channels; twice none at all
GATHER_PART_EDGES = 8192  # a part takes 0.1 ms, many times what handing it out does
PACKAGES = ("torch", "torch-geometric", "numba", "numpy", "triton")


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
    available = psutil.virtual_memory().available
    if needed > available:
        raise DoesNotFitError(
            f"{what}: needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available."
        )


def copy_call() -> Callable[[], object]:
    """A copy of `COPY_BYTES`; it moves twice as many."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def gather_call(graph: Graph, width: int) -> Callable[[], object]:
    """One row-gather floor: every cache line of `x[col[e]]` read, `x [N, width]`, in Numba.

    Nothing is computed or written. This is the least that a pass over the edges has to do.
    """
    # Rows padded to whole cache lines: the floor is that of the lines, whatever the width.
    lines = -(-width // CACHE_LINE_FLOATS)
    x = torch.ones(graph.num_nodes * lines * CACHE_LINE_FLOATS).numpy()
    col = graph.col.numpy()
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
