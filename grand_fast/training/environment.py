"""What a run ran with: versions of packages, and its peak of memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator

import torch

from grand_fast._version import __version__

# Packages that decide results and speed
PACKAGES = ("torch", "torch_geometric", "numpy", "scipy", "scikit-learn", "llvmlite", "triton")


def versions() -> dict[str, str]:
    """Versions of Python, grand-fast and the packages that decide results and speed."""
    found = {"python": platform.python_version(), "grand_fast": __version__}
    for package in PACKAGES:
        if version := version_of(package):
            found[package] = version
    return found


@contextlib.contextmanager
def torch_memory_errors() -> Iterator[None]:
    """What torch cannot allocate on the CPU is a MemoryError: it has no type of error for it."""
    try:
        yield
    except RuntimeError as error:
        _, allocator, problem = str(error).partition("DefaultCPUAllocator: ")
        if not allocator:
            raise
        raise MemoryError(f"{problem.splitlines()[0]} Choose smaller sizes.") from error


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes held at once: by tensors on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux


def version_of(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
