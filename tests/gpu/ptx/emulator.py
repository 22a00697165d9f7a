"""Run what Triton compiled for a GPU that is not there: its PTX, in numpy, on host memory.

The threads of a program go in lockstep, and with them the programs that take the same branches.
Threads of one program that branch apart are an error, since the kernels here have masks instead;
programs that branch apart go on one group after the other.

On the way everything is checked that a GPU does not: accesses lie in tensors and are aligned,
barriers stand between accesses to shared memory, no program depends on the order of programs.
Not covered: tensor cores, asynchronous copies, atomics, and what `ptxas` makes of the PTX.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.gpu_report.compile import Launch, compile_launch
from tests.gpu.ptx import parser
from tests.gpu.ptx.arithmetic import DTYPES
from tests.gpu.ptx.group import Group, Machine
from tests.gpu.ptx.instructions import Branch, Step, translate
from tests.gpu.ptx.memory import WARP, GlobalMemory, SharedMemory
from tests.gpu.ptx.parser import EmulationError, Kernel

_TOGETHER = 64  # programs that start as one group: numpy's overhead against memory
_ENDLESS = 10**7  # times that one instruction may run: hours
_SCALARS = {"fp32": "f32", "i32": "s32", "i64": "s64", "u32": "u32", "u64": "u64"}


@dataclass(frozen=True)
class Statistics:
    """What a launch executed.

    instructions: by opcode, per warp. Sectors are of 32 bytes. bytes_loaded: what the lanes of a
    warp asked for, each address once, by the bytes that one lane loads at a time.
    """

    kernel: str
    programs: int
    instructions: Counter[str]
    sectors_loaded: int
    sectors_stored: int
    bytes_loaded: Counter[int]

    @property
    def wide_percent(self) -> float:
        """Of the bytes loaded, those in loads of 128 bits a lane."""
        return 100 * self.bytes_loaded[16] / max(1, self.bytes_loaded.total())

    @property
    def shuffles(self) -> int:
        """Exchanges of a register between the lanes of a warp."""
        return self._count("shfl.")

    @property
    def barriers(self) -> int:
        """Barriers of all threads of a program, times its warps; those of a warp do not count."""
        return self._count("bar.sync")

    def _count(self, prefix: str) -> int:
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))


@contextmanager
def emulated(arch: str) -> Iterator[list[Statistics]]:
    """Within the block, Triton's launches are compiled for `arch` and emulated, on CPU tensors."""
    executed: list[Statistics] = []
    run_jit = JITFunction.run

    def launch(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:  # only compiles
            return run_jit(self, *args, grid=grid, warmup=True, **kwargs)
        executed.append(run(Launch(self, tuple(grid), args, kwargs), arch))
        return None

    JITFunction.run = launch
    try:
        yield executed
    finally:
        JITFunction.run = run_jit


def run(launch: Launch, arch: str, *, edit: Callable[[str], str] | None = None) -> Statistics:
    """Compile a launch for `arch` and emulate it; `edit` may change its PTX, to break it."""
    compiled = compile_launch(launch, arch)
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    arguments: dict[str, Tensor | np.generic] = {}
    for name, kind in compiled.src.signature.items():
        arguments |= _arguments(name, values[name], kind)
    ptx = compiled.asm["ptx"]
    return execute(
        ptx if edit is None else edit(ptx),
        list(arguments.values()),
        launch.grid,
        shared=compiled.metadata.shared,
        names=list(arguments),
    )


def _arguments(name: str, value: Any, kind: Any) -> dict[str, Tensor | np.generic]:
    """As the launch hands them to the device: a tuple's elements each by itself."""
    if isinstance(kind, tuple):
        parts = (
            _arguments(f"{name}[{i}]", *v) for i, v in enumerate(zip(value, kind, strict=True))
        )
        return {name: part for some in parts for name, part in some.items()}
    if kind == "constexpr":  # so is None, and 1 where Triton specialises
        return {}
    if isinstance(value, Tensor):
        return {name: value}
    if kind not in _SCALARS:
        raise EmulationError(f"`{name}`: arguments of type {kind} are not emulated")
    return {name: DTYPES[_SCALARS[kind]].type(value)}


def execute(
    ptx: str,
    arguments: Sequence[Tensor | np.generic],
    grid: Sequence[int],
    *,
    shared: int = 0,
    names: Sequence[str] = (),
) -> Statistics:
    """Run every program of a launch.

    Args:
        ptx: a module with one kernel.
        arguments: of the kernel, in order, tensors in host memory. Those missing at the end are
            null, as Triton's pointers to scratch memory are where there is none.
        grid: number of programs, along up to three axes.
        shared: bytes of shared memory.
        names: of the arguments, for messages.
    """
    kernel, steps = _translated(ptx)
    x, y, z = (*grid, 1, 1)[:3]
    names = [*names, *(f"argument {i}" for i in range(len(names), len(arguments)))]
    tensors = {n: a for n, a in zip(names, arguments, strict=True) if isinstance(a, Tensor)}
    values = [np.uint64(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    values += [np.uint64(0)] * (len(kernel.parameters) - len(values))
    memory = GlobalMemory(tensors, _smallest_element(kernel))
    by_parameter = dict(zip(kernel.parameters, values, strict=True))
    machine = Machine(kernel, (x, y, z), by_parameter, memory)
    counts = [0] * len(steps)
    with np.errstate(all="ignore"):
        for first in range(0, x * y * z, _TOGETHER):
            programs = np.arange(first, min(first + _TOGETHER, x * y * z))
            _run(Group(machine, programs, SharedMemory(len(programs), shared)), steps, counts)
    memory.finish()
    instructions: Counter[str] = Counter()
    for instruction, count in zip(kernel.instructions, counts, strict=True):
        if count:
            instructions[str(instruction.opcode)] += count * (kernel.threads // WARP)
    return Statistics(
        kernel.name,
        x * y * z,
        instructions,
        memory.sectors_loaded,
        memory.sectors_stored,
        memory.bytes_loaded,
    )


@lru_cache(maxsize=64)
def _translated(ptx: str) -> tuple[Kernel, list[Step | Branch]]:
    """A kernel, and what to do at each of its instructions."""
    kernel = parser.parse(ptx)
    steps: list[Step | Branch] = []
    for i, instruction in enumerate(kernel.instructions):
        try:
            steps.append(translate(instruction, kernel))
        except EmulationError as error:
            raise EmulationError(f"{_where(kernel, i)}: {error}") from None
    return kernel, steps


def _smallest_element(kernel: Kernel) -> int:
    """Bytes of the smallest element that it loads or stores."""
    kinds = [i.opcode.types[0] for i in kernel.instructions if "global" in i.opcode.modifiers]
    return min((DTYPES[kind].itemsize for kind in kinds), default=4)


def _run(group: Group, steps: Sequence[Step | Branch], counts: list[int]) -> None:
    """Until the last of the group's programs has returned."""
    waiting = [group]
    while waiting:
        group = waiting.pop()
        while group.at < len(steps):
            step = steps[group.at]
            counts[group.at] += len(group.programs)
            try:
                if counts[group.at] > _ENDLESS:
                    raise EmulationError("a loop does not end")
                if isinstance(step, Branch):
                    group, *others = _branch(group, step)
                    waiting += others
                else:
                    step(group)
                    group.at += 1
            except EmulationError as error:
                where = _where(group.machine.kernel, group.at)
                raise EmulationError(f"{where}: {error}") from None


def _branch(group: Group, branch: Branch) -> list[Group]:
    """The group, at its next instruction; or its two parts, if the programs part here."""
    jumps = np.ones(len(group.programs), bool)
    if branch.taken is not None:
        taken = branch.taken(group)
        jumps = taken[:, 0]
        divergent = (taken != taken[:, :1]).any(1)
        if divergent.any():
            program = int(group.programs[divergent][0])
            raise EmulationError(f"divergent branch: threads of program {program} part")
    if jumps.any() and not jumps.all():
        return [group.select(jumps, branch.target), group.select(~jumps, group.at + 1)]
    group.at = branch.target if jumps.all() else group.at + 1
    return [group]


def _where(kernel: Kernel, at: int) -> str:
    instruction = kernel.instructions[at]
    return f"{kernel.name}, PTX line {instruction.line}, `{instruction.text}`"
