"""Memory for results: in huge pages, and kept for the next result when one is freed.

The system clears every page it hands out, which is one more pass over each result: on ogbn-arxiv it
took 5 to 12 ms of a forward pass of 100 ms in huge pages, 45 ms in pages of 4 KiB.
"""

import contextlib
import math
import mmap
import os
import threading
import weakref
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

_LARGE = 2 << 20  # bytes; below it the C library's own allocator keeps what is freed
_HUGE_PAGE = 2 << 20  # bytes
# What lies idle may take this share of the machine's memory; beyond it, what was freed first goes
# back to the system. A step on ogbn-arxiv at 128 channels has results of 0.5 GB.
_IDLE_SHARE = 1 / 48

_GROUPS = Path("/sys/fs/cgroup")

_idle: list[mmap.mmap] = []  # in the order in which they were freed
_lock = threading.Lock()
_has_huge_pages = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose elements are not yet written."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    page = _HUGE_PAGE if size >= 2 * _HUGE_PAGE else mmap.PAGESIZE  # or half of it could be unused
    size = -(-size // page) * page
    if size < _LARGE or not _has_huge_pages:
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = _take(size)
    if pages is None:
        return torch.empty(shape, dtype=dtype, device="cpu")  # or torch says what does not fit
    view = memoryview(pages)  # lives as long as the tensor's storage
    weakref.finalize(view, _give_back, pages).atexit = False
    # Not a view of another tensor: autograd adds in place to a gradient that alone has its storage.
    return torch.frombuffer(view, dtype=dtype, count=count).resize_(shape)


def _take(size: int) -> mmap.mmap | None:
    with _lock:
        for i in reversed(range(len(_idle))):
            if len(_idle[i]) == size:
                return _idle.pop(i)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _give_back(pages: mmap.mmap) -> None:
    # The garbage collector may call this while this very thread holds the lock: never wait.
    if len(pages) > _idle_limit() or not _lock.acquire(blocking=False):
        return  # and the pages go back to the system
    try:
        _idle.append(pages)
        total = sum(map(len, _idle))
        while total > _idle_limit():
            total -= len(_idle.pop(0))
    finally:
        _lock.release()


@lru_cache
def _idle_limit() -> int:
    return int(_IDLE_SHARE * min(psutil.virtual_memory().total, container_limit()))


def container_limit(root: Path = _GROUPS) -> float:
    """Bytes that the control group allows this process; infinite if it does not say."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            return int((root / name).read_text())
    return math.inf


def free_memory(root: Path = _GROUPS) -> float:
    """Bytes that the machine and the control group have left; files in memory give way."""
    used = 0
    for use, stat in (("memory.current", "memory.stat"),
                      ("memory/memory.usage_in_bytes", "memory/memory.stat")):  # fmt: skip
        with contextlib.suppress(OSError, ValueError):
            used = int((root / use).read_text())
            kinds = dict(line.split() for line in (root / stat).read_text().splitlines())
            used -= int(kinds.get("total_inactive_file", kinds.get("inactive_file", 0)))
            break
    return float(min(psutil.virtual_memory().available, container_limit(root) - used))


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held it
