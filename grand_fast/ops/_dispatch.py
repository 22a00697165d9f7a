"""Which backend runs an operator: the table, and the reasons why one cannot.

Only this file imports a `gpu.py` or `cpu.py`, and only when it is about to be called, so that
`import grand_fast` works where Triton or llvmlite is absent.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["auto", "gpu", "cpu", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "gpu", "cpu", "reference")

_PACKAGES = {"gpu": "triton", "cpu": "llvmlite"}
_DTYPES = {
    "gpu": (torch.float16, torch.bfloat16, torch.float32),
    "cpu": (torch.float32, torch.float64),
}
_log = logging.getLogger("grand_fast")
_block: ContextVar[str | None] = ContextVar("grand_fast_backend", default=None)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run every operator of the block on one backend.

    Args:
        name: `"auto"`, `"gpu"`, `"cpu"` or `"reference"`. An operator's own `backend=` goes first,
            then this, then the environment variable `GRAND_FAST_BACKEND`.
    """
    _check_name("backend", name)
    token = _block.set(name)
    try:
        yield
    finally:
        _block.reset(token)


def choose(op: str, name: str, x: Tensor) -> str:
    """The backend that runs `op` on tensors like `x`.

    Raises:
        ValueError: unknown name. RuntimeError: the one asked for cannot run; all its reasons.
    """
    _check_name(op, name)
    if name == "auto":
        name = _block.get() or os.environ.get("GRAND_FAST_BACKEND") or "auto"
        _check_name("GRAND_FAST_BACKEND", name)
    if name == "reference":
        return name
    asked = name != "auto"
    if not asked:
        name = "gpu" if x.is_cuda else "cpu"
    reasons = unsupported_reasons(name, x.device.type, x.dtype)
    if not reasons:
        return name
    if asked:
        raise RuntimeError(f"{op}: backend '{name}' cannot run: {'; '.join(reasons)}.")
    _warn_once(op, name, "; ".join(reasons))
    return "reference"


def launchers(op: str, name: str) -> ModuleType:
    """The module of kernels of `op` on backend `name`."""
    return _import(f"grand_fast.kernels.{op}.{name}")


def plan(name: str) -> Any:
    """The function that prepares a graph's work list for backend `name`; None for the reference."""
    if name == "reference":
        return None
    module = "_cpu" if name == "cpu" else "_triton"
    return _import(f"grand_fast.kernels.{module}").plan


def projection() -> ModuleType:
    """The CPU backend's products with few channels; elsewhere torch's are as fast."""
    return _import("grand_fast.kernels._projection")


@lru_cache(maxsize=64)
def unsupported_reasons(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Why backend `name` cannot run on tensors of this device type and dtype; empty if it can."""
    reasons = []
    package = _PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        reasons.append(f"{package} is not installed (pip install {package})")
    if name == "gpu" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"tensors must be on a CUDA device, got '{device}'")
    if name == "cpu" and device != "cpu":
        reasons.append(f"tensors must be on the CPU, got '{device}'")
    if name in _DTYPES and dtype not in _DTYPES[name]:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[name])
        reasons.append(f"dtype must be one of {known}, got {str(dtype).removeprefix('torch.')}")
    return reasons


@lru_cache(maxsize=64)
def _import(name: str) -> ModuleType:
    return importlib.import_module(name)


@lru_cache(maxsize=64)
def _warn_once(op: str, name: str, reasons: str) -> None:
    _log.warning("%s: falls back from '%s' to the reference: %s.", op, name, reasons)


def _check_name(op: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {name!r}.")
