"""Compile Triton kernels for a GPU that is not there, exactly as their launchers would.

A stand-in driver answers the few questions that Triton's own launch path asks of a device, so
arguments are specialised as on that GPU and the machine code is the one a user gets. Nothing runs.
With `TRITON_INTERPRET=1` there is no compiler: leave it unset.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from grand_fast.kernels.attention_diffusion.gpu import REGISTERS_OF_BLACKWELL

# The GPUs whose machine code is gated and modelled: A100 and H100.
MODELLED = ("sm_80", "sm_90")
TARGETS = {arch: GPUTarget("cuda", int(arch[3:]), 32) for arch in (*MODELLED, "sm_100", "sm_120")}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Of each backend: its text, and how loads of 128 bits, barriers and atomics on floats look in it
_COUNTED = {
    "cuda": ("ptx", r"\bld\.global\S*\.v4\.\w32", r"\bbar\.sync",
             r"\b(?:atom|red)\.\S*\.b?f\d+"),
    # without an instruction for a type, its atomics are loops around cmpswap
    "hip": ("amdgcn", r"\b(?:global|buffer|flat)_load_dwordx4\b", r"\bs_barrier\b",
            r"_atomic_(?:\w*_b?f(?:16|32|64)|cmpswap)"),
}  # fmt: skip
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as a launcher made it."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return str(self.kernel.__name__)

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument by its name, `num_warps` and the like among them.

        Those of a named tuple each by itself, tensors as pointers: `col_ptr` of `view.col`.
        """
        named = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.kwargs
        fields: dict[str, Any] = {}
        for value in [v for v in named.values() if hasattr(v, "_asdict")]:
            for name, field in value._asdict().items():
                fields[f"{name}_ptr" if isinstance(field, Tensor) else name] = field
        constants = {n: v.value for n, v in fields.items() if isinstance(v, tl.constexpr)}
        return fields | constants | named

    @property
    def slots(self) -> int:
        """Edges that one turn of the kernel's loop takes; 1 where it goes over something else."""
        sizes = self.kwargs.get("sizes", {})
        return int(sizes.get("BLOCK_E", 1) * sizes.get("BLOCK_G", 1))


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes from its multiprocessor.

    registers: per lane; of NVIDIA's at most 255, and 64 let 32 warps be resident. stack: bytes per
    lane of local memory, where spilled registers go (Triton has no other use for it). shared: bytes
    per program. The others count instructions of PTX or amdgcn: wide_loads are loads of 128 bits a
    lane.
    """

    registers: int
    stack: int
    shared: int
    warps: int
    wide_loads: int
    barriers: int
    float_atomics: int


class _AbsentDevice:
    """The answers Triton's launch path needs to compile for a device that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # keys the kernel's cache

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches of a block instead of making them; outputs stay uninitialised."""
    launches: list[Launch] = []
    kinds = (JITFunction, InterpretedFunction)
    runs = [kind.run for kind in kinds]

    def note(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, tuple(grid), args, kwargs))

    for kind in kinds:
        kind.run = note
    try:
        yield launches
    finally:
        for kind, run in zip(kinds, runs, strict=True):
            kind.run = run


def compile_launch(launch: Launch, arch: str) -> CompiledKernel:
    """The kernel of `launch`, specialised on its arguments and compiled for `arch`."""
    active = driver._active
    driver.set_active(_AbsentDevice(TARGETS[arch]))
    options = dict(launch.kwargs)
    if arch not in MODELLED:
        limit = options.pop("maxnreg", None)  # of NVIDIA's GPUs before sm_100
        if limit is not None and TARGETS[arch].backend == "cuda":
            options["maxnreg"] = REGISTERS_OF_BLACKWELL
    try:
        return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **options)
    finally:
        driver._active = active  # set_active(None) would look for a real device


def resources(compiled: CompiledKernel) -> Resources:
    """Registers, stack and shared memory of a compiled kernel, and what its code counts."""
    backend = compiled.metadata.target.backend
    code, *patterns = _COUNTED[backend]
    text = compiled.asm[code]
    if backend == "hip":  # its binary needs no tool: what the assembler gets says it too
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", text))
        registers, stack = found["vgpr_count"], found["private_segment_fixed_size"]
    else:
        usage = _on_cubin(compiled.asm["cubin"], "cuobjdump", "-res-usage")
        found = dict(re.findall(r"([A-Z]+):(\d+)", usage))
        registers, stack = found["REG"], int(found["STACK"]) + int(found["LOCAL"])
    return Resources(
        int(registers),
        int(stack),
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        *(len(re.findall(pattern, text)) for pattern in patterns),
    )


def disassembly(compiled: CompiledKernel) -> str:
    """The machine code of a kernel compiled for NVIDIA, with its raw encoding."""
    # The flow of data, a third of its time, would only be for a graph
    return _on_cubin(compiled.asm["cubin"], "nvdisasm", "-c", "-hex", "--no-dataflow")


@cache  # nvdisasm takes half a second to start
def _on_cubin(code: bytes, tool: str, *flags: str) -> str:
    # cuobjdump looks for nvdisasm on the path
    env = os.environ | {"PATH": f"{_NVIDIA_TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code)
        command = [str(_NVIDIA_TOOLS / tool), *flags, str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return result.stdout
