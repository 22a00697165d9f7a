"""Operands of PTX instructions: how to get their values, and where to put results."""

import re
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from tests.gpu.ptx.arithmetic import DTYPES, Array
from tests.gpu.ptx.group import Group, Register
from tests.gpu.ptx.memory import WARP
from tests.gpu.ptx.parser import EmulationError, Instruction, Kernel, split_address

# The values of an operand, [programs, threads], or of length 1 where all have the same.
Read: TypeAlias = Callable[[Group], Array]

_SHARED_SYMBOL = "global_smem"  # Triton's only shared memory; it begins at address 0
_REGISTER = re.compile(r"(%[a-z]+)\d+")
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])|%laneid")
_FLOAT_BITS = re.compile(r"0([fF][0-9a-fA-F]{8}|[dD][0-9a-fA-F]{16})")
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?")


def active_lanes(instruction: Instruction, kernel: Kernel) -> Callable[[Group], Array | None]:
    """The lanes in which an instruction acts; None for all."""
    if instruction.guard is None:
        return lambda group: None
    return values_of(instruction.guard, "pred", kernel)


def addresses(operand: str, space: str, kernel: Kernel) -> Read:
    """Addresses as signed numbers, so that an offset may be negative."""
    base, offset = split_address(operand)
    read = values_of(base, "u32" if space == "shared" else "u64", kernel)
    return lambda group: read(group).astype(np.int64) + offset


def register_of(name: str, kernel: Kernel) -> Register:
    """The register that an operand names."""
    match = _REGISTER.fullmatch(name)
    if match is None or match[1] not in kernel.registers:
        raise EmulationError(f"`{name}` is no register")
    kind = kernel.registers[match[1]]
    return Register(name, kind if kind == "pred" else f"b{8 * DTYPES[kind].itemsize}")


def values_of(operand: str, kind: str, kernel: Kernel) -> Read:
    """How to get an operand as an array of type `kind`, one element per lane or one for all."""
    if operand.startswith("!"):
        negated = values_of(operand[1:], kind, kernel)
        return lambda group: ~negated(group)
    if special := _SPECIAL.fullmatch(operand):
        return _read_special(special[1], special[2], kind)
    if not operand.startswith("%"):
        value = _constant(operand, kind)
        return lambda group: value
    register = register_of(operand, kernel)
    dtype, stored = DTYPES[kind], DTYPES[register.kind]
    if (dtype.kind == "b") != (stored.kind == "b") or dtype.itemsize > stored.itemsize:
        raise EmulationError(f"{register.name} holds {register.kind}, not {kind}")
    if dtype.itemsize == stored.itemsize:
        return lambda group: group.read(register).view(dtype)
    lower = DTYPES[f"b{8 * dtype.itemsize}"]
    return lambda group: group.read(register).astype(lower).view(dtype)


def _read_special(name: str | None, axis: str, kind: str) -> Read:
    """Thread, program and their numbers. Triton's threads have one axis, programs three."""
    dtype, i = DTYPES[kind], "xyz".index(axis or "x")
    if name is None:
        return lambda group: (np.arange(group.shape[1]) % WARP).astype(dtype)[None, :]
    if name == "tid":
        return lambda group: (np.arange(group.shape[1]) * (i == 0)).astype(dtype)[None, :]
    if name == "ntid":
        return lambda group: np.full((1, 1), group.shape[1] if i == 0 else 1, dtype)
    if name == "nctaid":
        return lambda group: np.full((1, 1), group.machine.grid[i], dtype)

    def program(group: Group) -> Array:
        before = int(np.prod(group.machine.grid[:i]))
        return (group.programs // before % group.machine.grid[i]).astype(dtype)[:, None]

    return program


def _constant(operand: str, kind: str) -> Array:
    """A number, or the address of shared memory."""
    dtype, size = DTYPES[kind], DTYPES[kind].itemsize
    name, _, offset = operand.partition("+")
    if name == _SHARED_SYMBOL:
        operand = offset or "0"
    if match := _FLOAT_BITS.fullmatch(operand):
        if len(match[1]) != 1 + 2 * size:
            raise EmulationError(f"`{operand}` is no constant of type {kind}")
        bits = int(match[1][1:], 16)
    elif _INTEGER.fullmatch(operand):
        bits = int(operand.rstrip("U"), 0) & ((1 << 8 * size) - 1)
    else:
        raise EmulationError(f"operand `{operand}` is not understood")
    if kind == "pred":
        return np.full((1, 1), bits != 0)
    return np.full((1, 1), bits, DTYPES[f"b{8 * size}"]).view(dtype)
