"""`grand-fast info`: the machine, the backends, the versions, and what is missing."""

import os
import platform
import sys
from pathlib import Path

import psutil
import torch

from grand_fast._version import __version__
from grand_fast.data import public_files
from grand_fast.ops.backends import BACKENDS, unsupported_reasons
from grand_fast.training.environment import (
    GIB,
    PACKAGES,
    gpu_names,
    processor,
    usable_cores,
    version_of,
    versions,
)

# What each optional package is for, and the extra that brings it
_OPTIONAL = {
    "torchdiffeq": ("solvers to compare with", "bench"),
    "pytest-benchmark": ("`pytest bench/ops`", "bench"),
    "tensorboard": ("curves of each epoch while training", "tensorboard"),
}


def describe_installation() -> list[str]:
    """The lines that `grand-fast info` prints, in their order."""
    memory = psutil.virtual_memory()
    lines = [
        f"grand-fast {__version__} in {Path(__file__).parent}",
        f"system     {platform.platform()}, Python {platform.python_version()}",
        f"processor  {processor()}, {usable_cores()} cores usable of {os.cpu_count()}",
        f"threads    torch {torch.get_num_threads()}",
        f"memory     {memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available",
        f"GPU        {gpu_names()}",
        "",
        "backends   (GRAND_FAST_BACKEND="
        f"{os.environ.get('GRAND_FAST_BACKEND') or 'unset'}; `auto` goes by the tensors' device)",
    ]
    for name in BACKENDS[1:]:
        device = "cuda" if name == "gpu" and torch.cuda.is_available() else "cpu"
        reasons = unsupported_reasons(name, torch.device(device), torch.float32)
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
