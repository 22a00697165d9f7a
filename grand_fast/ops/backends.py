"""Which backend runs an operator: the table, and the reasons why one cannot.

Only this file imports a `gpu.py` or `cpu.py`, and only when it is about to be called, so that
`import grand_fast` works where Triton or llvmlite is absent.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from grand_fast.kernels.cpu import memory

Backend = Literal["auto", "gpu", "cpu", "reference"]
BACKENDS: tuple[str, ...] = ("auto", "gpu", "cpu", "reference")

_PACKAGES = {"gpu": "triton", "cpu": "llvmlite"}
# The series whose machine code the tests run; another one may compile the same kernels wrongly.
TESTED_TRITON = "3.7"
OLDEST_CAPABILITY = (8, 0)  # A100: the oldest NVIDIA GPU that the kernels are compiled for
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

    A compiler gets the name as it is: a program chooses where and when it runs.

    Raises:
        ValueError: unknown name. RuntimeError: the one asked for cannot run; all its reasons.
        NotImplementedError: torch.jit.trace, which would keep the results as constants.
    """
    _check_name(op, name)
    if torch.compiler.is_compiling():
        return name
    check_untraced(op)
    if name == "auto":
        name = _block.get() or os.environ.get("GRAND_FAST_BACKEND") or "auto"
        _check_name("GRAND_FAST_BACKEND", name)
    if name == "reference":
        return name
    asked = name != "auto"
    if not asked:
        name = "gpu" if x.is_cuda else "cpu"
    reasons = unsupported_reasons(name, x.device, x.dtype)
    if not reasons:
        return name
    if asked:
        raise RuntimeError(f"{op}: {cannot_run(name, x.device, x.dtype)}")
    _warn_once(op, name, "; ".join(reasons))
    return "reference"


def check_untraced(op: str) -> None:
    """No torch.jit.trace is at work.

    Raises:
        NotImplementedError: it is, and would keep what kernels return as constants.
    """
    if torch._C._is_tracing():
        raise NotImplementedError(
            f"{op}: must be called outside torch.jit.trace, which cannot follow kernels. Use "
            "torch.compile, or torch.export.export with a Graph as the argument."
        )


def free_memory(device: torch.device) -> float:
    """Bytes that are free: of a GPU with what torch holds of it unused, else of the machine."""
    if device.type != "cuda":
        return memory.free_memory()
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + held)


def transforms_active() -> bool:
    """Whether a transform of torch.func, or forward mode, is at work: kernels follow neither."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


def unusual() -> str | None:
    """Why layers of other packages run as they are at the moment; None as a rule."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "it is traced or compiled"
    if transforms_active():
        return "a transform of torch.func is at work"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    return None


@contextmanager
def outside_transforms() -> Iterator[None]:
    """A block of plain tensors, as if no transform of torch.func nor any batch were at work.

    For what runs again while a batch of gradients is mapped, and must do what it did before.
    """
    if not transforms_active() and batch_level() == 0:
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    level = batch_level()
    for _ in range(level):
        torch._C._vmapmode_decrement_nesting()
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        for _ in range(level):
            torch._C._vmapmode_increment_nesting()


def batch_level() -> int:
    """How many batches of gradients are nested, of the kind that `is_grads_batched` makes."""
    torch._C._vmapmode_increment_nesting()
    return torch._C._vmapmode_decrement_nesting()


def is_batched(t: Tensor) -> bool:
    """Whether it stands for a batch of gradients, or may do so: kernels take plain ones."""
    batched: bool = torch._C._functorch.is_legacy_batchedtensor(t)
    return batched or transforms_active()


def unwrapped(t: Tensor) -> Tensor:
    """The plain tensor that transforms of torch.func have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def is_mapped(t: Tensor) -> bool:
    """Whether torch.func.vmap maps over it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def is_reference(op: str, name: str) -> bool:
    """Whether the reference computes `op`: as backend, or because torch.func transforms it."""
    if transforms_active():
        _warn_once(op, name, "it is differentiated or mapped by torch.func")
        return True
    return name == "reference"


def cannot_run(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence: why backend `name` cannot run, and what `auto` uses instead; None if it can."""
    reasons = unsupported_reasons(name, device, dtype)
    if not reasons:
        return None
    best = "gpu" if device.type == "cuda" else "cpu"
    instead = "reference" if unsupported_reasons(best, device, dtype) else best
    return f"backend '{name}' cannot run: {'; '.join(reasons)}. 'auto' uses '{instead}' here."


def launchers(op: str, name: str) -> ModuleType:
    """The module of kernels of `op` on backend `name`."""
    return _import(f"grand_fast.kernels.{op}.{name}")


def plan(name: str) -> Any:
    """The function that prepares a graph's work list for backend `name`; None for the reference."""
    if name == "reference":
        return None
    module = "cpu.rows" if name == "cpu" else "gpu.pieces"
    return _import(f"grand_fast.kernels.{module}").plan


def result_like(x: Tensor) -> Tensor:
    """Memory of the CPU backend for a result like `x`, which its next results use again."""
    if cannot_run("cpu", x.device, x.dtype):
        return torch.empty_like(x)
    empty: Tensor = _import("grand_fast.kernels.cpu.memory").empty(*x.shape, dtype=x.dtype)
    return empty


def column_dots() -> Any:
    """The CPU backend's sums of the columns of a product."""
    return _import("grand_fast.kernels.cpu.dense").column_dots


def unit_rows() -> ModuleType:
    """The CPU backend's vectors of length 1; elsewhere torch's passes are as fast."""
    return _import("grand_fast.kernels.cpu.unit_rows")


def projection() -> ModuleType:
    """The CPU backend's products with few channels; elsewhere torch's are as fast."""
    return _import("grand_fast.kernels.cpu.dense")


@lru_cache(maxsize=64)
def unsupported_reasons(name: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why backend `name` cannot run on tensors of this device and dtype; empty if it can."""
    reasons = []
    package = _PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        reasons.append(f"{package} is not installed (pip install {package})")
    elif name == "gpu":
        version = _triton_version()
        if not version.startswith(f"{TESTED_TRITON}."):
            remedy = f"pip install 'triton=={TESTED_TRITON}.*'"
            reasons.append(f"triton {version} is untested ({remedy})")
    if name == "gpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons += _unfit_gpu(device)
    if name == "cpu" and device.type != "cpu":
        reasons.append(f"tensors must be on the CPU, got '{device.type}'")
    if name in _DTYPES and dtype not in _DTYPES[name]:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[name])
        reasons.append(f"dtype must be one of {known}, got {str(dtype).removeprefix('torch.')}")
    return reasons


def _triton_version() -> str:
    """Without importing it, which takes a second; builds of torch bring it under several names."""
    for name in ("triton", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "of unknown version"


def _unfit_gpu(device: torch.device) -> list[str]:
    if not torch.cuda.is_available():
        return ["torch sees no GPU"]
    if device.type != "cuda":
        return [f"tensors must be on a CUDA device, got '{device.type}'"]
    # AMD counts its architectures in other numbers, and none that torch supports is too old.
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            oldest, got = (f"{major}.{minor}" for major, minor in (OLDEST_CAPABILITY, capability))
            name = torch.cuda.get_device_name(device)
            return [f"the GPU must be of compute capability {oldest} or newer, got {got} ({name})"]
    return []


@lru_cache(maxsize=64)
def _import(name: str) -> ModuleType:
    return importlib.import_module(name)


@lru_cache(maxsize=64)
def _warn_once(op: str, name: str, reasons: str) -> None:
    _log.warning("%s: falls back from '%s' to the reference: %s.", op, name, reasons)


def _check_name(op: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{op}: `backend` must be one of {', '.join(BACKENDS)}, got {name!r}.")
