"""What a run runs with: versions of packages, the machine, and its peak of memory."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from grand_fast._version import __version__

# Packages that decide results and speed
PACKAGES = ("torch", "torch_geometric", "numpy", "scipy", "scikit-learn", "llvmlite", "triton")
GIB = 2**30


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


@lru_cache
def version_of(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def processor() -> str:
    """The model of the CPU."""
    with contextlib.suppress(OSError):  # Linux: platform.processor() is empty there
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_names() -> str:
    """The GPUs, or why there is none."""
    if torch.cuda.is_available():
        devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        names = [f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices]
        return f"{', '.join(names)}; CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA; see https://pytorch.org/get-started/locally"
    return "none seen by torch: check the driver with nvidia-smi"
