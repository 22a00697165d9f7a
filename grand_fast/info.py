"""`grand-fast info`: the machine, the backends, the versions, and what is missing."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

import torch

from grand_fast._version import __version__
from grand_fast.data import public_files
from grand_fast.ops.backends import BACKENDS, unsupported_reasons
from grand_fast.training.environment import PACKAGES, version_of, versions

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
        version = version_of(package)
        missing = f"missing, optional ({purpose}): pip install 'grand-fast[{extra}]'"
        lines.append(f"  {package:<16} {version or missing}")
    lines += ["", f"data sets  (GRAND_FAST_DATA={os.environ.get('GRAND_FAST_DATA') or 'unset'})"]
    lines.append(f"  {'digits':<16} built in")
    for name in public_files.NAMES:
        try:
            lines.append(f"  {name:<16} {public_files.find(name)}")
        except public_files.DataError as error:
            lines.append(f"  {name:<16} {str(error).removeprefix(name + ': ')}")
    return lines


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
