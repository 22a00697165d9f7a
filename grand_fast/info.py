"""`grand-fast info`: the machine, the backends, the versions, and what is missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from grand_fast import raw_files
from grand_fast._version import __version__
from grand_fast.ops.backends import BACKENDS, unsupported_reasons

# Packages that decide results and speed
PACKAGES = ("torch", "torch_geometric", "numpy", "scipy", "scikit-learn", "llvmlite", "triton")
# What each optional package is for, and the extra that brings it
_OPTIONAL = {
    "torchdiffeq": ("solvers to compare with", "bench"),
    "pytest-benchmark": ("`pytest bench/ops`", "bench"),
    "tensorboard": ("curves of each epoch while training", "tensorboard"),
}
_GIB = 2**30


def describe_installation() -> list[str]:
    """Lines of `grand-fast info`."""
    import psutil

    memory = psutil.virtual_memory()
    lines = [
        f"grand-fast {__version__} in {Path(__file__).parent}",
        f"system     {platform.platform()}, Python {platform.python_version()}",
        f"processor  {_processor()}, {_usable_cores()} cores usable of {os.cpu_count()}",
        f"threads    torch {torch.get_num_threads()}",
        f"memory     {memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB available",
        f"GPU        {_gpu()}",
        "",
        "backends   (GRAND_FAST_BACKEND="
        f"{os.environ.get('GRAND_FAST_BACKEND') or 'unset'}; `auto` goes by the tensors' device)",
    ]
    for name in BACKENDS[1:]:
        reasons = unsupported_reasons(name, _device_of(name), torch.float32)
        lines.append(f"  {name:<16} {'unavailable: ' + '; '.join(reasons) if reasons else 'ready'}")
    lines += ["", "packages"]
    found = versions()
    for package in PACKAGES:
        missing = f"missing: pip install {package}"
        if package == "triton" and sys.platform != "linux":
            missing = "missing: for GPU kernels, on Linux only"
        lines.append(f"  {package:<16} {found.get(package, missing)}")
    for package, (purpose, extra) in _OPTIONAL.items():
        version = _version(package)
        missing = f"missing, optional ({purpose}): pip install 'grand-fast[{extra}]'"
        lines.append(f"  {package:<16} {version or missing}")
    lines += ["", f"data sets  (GRAND_FAST_DATA={os.environ.get('GRAND_FAST_DATA') or 'unset'})"]
    lines.append(f"  {'digits':<16} built in")
    for name in raw_files.NAMES:
        try:
            lines.append(f"  {name:<16} {raw_files.find(name)}")
        except raw_files.DataError as error:
            lines.append(f"  {name:<16} {str(error).removeprefix(name + ': ')}")
    return lines


def versions() -> dict[str, str]:
    """Versions of Python, grand-fast and the packages that decide results and speed."""
    found = {"python": platform.python_version(), "grand_fast": __version__}
    for package in PACKAGES:
        if version := _version(package):
            found[package] = version
    return found


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


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "gpu" and torch.cuda.is_available() else "cpu")


def _processor() -> str:
    with contextlib.suppress(OSError):  # Linux: platform.processor() is empty there
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> str:
    if torch.cuda.is_available():
        devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        names = [f"{device.name} ({device.total_memory / _GIB:.0f} GiB)" for device in devices]
        return f"{', '.join(names)}; CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA; see https://pytorch.org/get-started/locally"
    return "none seen by torch: check the driver with nvidia-smi"
