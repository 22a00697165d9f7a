"""Registers and memories of the programs of a launch that are at the same instruction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tests.gpu.ptx.arithmetic import DTYPES, Array
from tests.gpu.ptx.memory import Access, GlobalMemory, SharedMemory
from tests.gpu.ptx.parser import EmulationError, Kernel


class Register(NamedTuple):
    """A register, and the type of its bits."""

    name: str
    kind: str


@dataclass(frozen=True)
class Machine:
    """What all programs of a launch share. arguments: the value of each parameter."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: Mapping[str, np.generic]
    memory: GlobalMemory


class Group:
    """Programs in lockstep. Registers hold unsigned bits or truth values, [programs, threads]."""

    def __init__(self, machine: Machine, programs: Array, shared: SharedMemory) -> None:
        self.machine, self.programs, self.shared = machine, programs, shared
        self.shape = (len(programs), machine.kernel.threads)
        self.at = 0  # the next instruction
        self.registers: dict[str, Array] = {}
        # Threads are counted through all programs.
        self.thread = programs[:, None] * self.shape[1] + np.arange(self.shape[1])
        self.row = np.broadcast_to(np.arange(len(programs))[:, None], self.shape)

    def select(self, keep: Array, at: int) -> "Group":
        """A copy of some of the programs, to go on at instruction `at`."""
        part = Group(self.machine, self.programs[keep], self.shared.select(keep))
        part.registers = {name: value[keep] for name, value in self.registers.items()}
        part.at = at
        return part

    def read(self, register: Register) -> Array:
        """Its bits; all ones, which is NaN, if it was never written.

        The compiler leaves such a register where nobody looks at the result.
        """
        bits = self.registers.get(register.name)
        if bits is None:
            bits = np.broadcast_to(~np.zeros((1, 1), DTYPES[register.kind]), self.shape)
        return bits

    def write(self, target: Register, value: Array, active: Array | None) -> None:
        """Set a register from the values of all lanes; where not active, it keeps its own."""
        bits = value if target.kind == "pred" else _as_bits(value, target)
        if active is not None:
            bits = np.where(active, bits, self.read(target))
        self.registers[target.name] = np.broadcast_to(bits, self.shape)

    def write_active(self, target: Register, value: Array, active: Array | None) -> None:
        """Set a register from the values of the active lanes alone, one after the other."""
        if active is None:
            self.write(target, value.reshape(self.shape), None)
        else:
            bits = self.read(target).copy()
            bits[active] = _as_bits(value, target)
            self.registers[target.name] = bits

    def access(
        self, address: Array, active: Array | None, dtype: np.dtype[Any], width: int
    ) -> Access:
        """The active lanes' accesses to `width` elements at `address`."""
        on = np.ones(self.shape, bool) if active is None else active
        address = np.broadcast_to(address, self.shape)
        return Access(address[on], self.thread[on], self.row[on], self.shape[1], dtype, width)


def _as_bits(value: Array, target: Register) -> Array:
    """Extended to the register's width if narrower: by its sign, if it has one."""
    bits, size = DTYPES[target.kind], DTYPES[target.kind].itemsize
    if value.dtype.itemsize > size:
        raise EmulationError(f"{8 * value.dtype.itemsize} bits do not fit {target.name}")
    if value.dtype.itemsize < size:
        sign = "i" if value.dtype.kind == "i" else "u"
        value = value.astype(f"{sign}{size}")
    return value.view(bits)
