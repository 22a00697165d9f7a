"""From an instruction to a function that performs it on a group of programs."""

import re
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from tests.gpu.ptx import arithmetic
from tests.gpu.ptx.arithmetic import DTYPES, Array
from tests.gpu.ptx.group import Group
from tests.gpu.ptx.memory import WARP, Access
from tests.gpu.ptx.operands import Read, active_lanes, addresses, register_of, values_of
from tests.gpu.ptx.parser import (
    EmulationError,
    Instruction,
    Kernel,
    split_address,
    vector,
)

Step: TypeAlias = Callable[[Group], None]


class Branch(NamedTuple):
    """A jump to an instruction, of the programs where `taken` holds; None: of all."""

    taken: Read | None
    target: int


_FULL_WARP = 0xFFFFFFFF
# How long data should stay in cache changes no result.
_CACHING = re.compile(r"ca|cg|cs|lu|wb|wt|nc|L[12]::\w+")
_MATRIX = frozenset({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared"})


def translate(instruction: Instruction, kernel: Kernel) -> Step | Branch:
    """What to do at `instruction`; an error names it if that is not known."""
    if instruction.opcode.name in ("bra", "ret"):
        return _branch(instruction, kernel)
    return _TRANSLATORS.get(instruction.opcode.name, _compute)(instruction, kernel)


def _branch(instruction: Instruction, kernel: Kernel) -> Branch:
    taken = None if instruction.guard is None else values_of(instruction.guard, "pred", kernel)
    if instruction.opcode.name == "ret":
        return Branch(taken, len(kernel.instructions))
    (label,) = instruction.operands
    if label not in kernel.labels:
        raise EmulationError(f"there is no label `{label}`")
    return Branch(taken, kernel.labels[label])


def _compute(instruction: Instruction, kernel: Kernel) -> Step:
    """Whatever touches registers alone."""
    function, kinds = arithmetic.operation(instruction.opcode)
    destination, *operands = instruction.operands
    target, active = register_of(destination, kernel), active_lanes(instruction, kernel)
    reads = [
        values_of(operand, kind, kernel) for operand, kind in zip(operands, kinds, strict=True)
    ]

    def step(group: Group) -> None:
        group.write(target, function(*[read(group) for read in reads]), active(group))

    return step


def _move(instruction: Instruction, kernel: Kernel) -> Step:
    """`mov`, which also takes a register apart, `{%rs1, %rs2}`, or puts one together."""
    destination, source = instruction.operands
    if "{" not in destination + source:
        return _compute(instruction, kernel)
    (kind,) = instruction.opcode.types
    parts = vector(source if "{" in source else destination)
    bits = 8 * DTYPES[kind].itemsize // len(parts)
    active = active_lanes(instruction, kernel)
    if "{" in source:
        whole = register_of(destination, kernel)
        reads = [values_of(part, f"b{bits}", kernel) for part in parts]

        def join(group: Group) -> None:
            value = np.zeros((1, 1), DTYPES[kind])
            for i, read in enumerate(reads):
                value = value | read(group).astype(DTYPES[kind]) << i * bits
            group.write(whole, value, active(group))

        return join
    read = values_of(source, kind, kernel)
    # `_` drops a part
    targets = [(i, register_of(part, kernel)) for i, part in enumerate(parts) if part != "_"]

    def split(group: Group) -> None:
        value = read(group)
        for i, target in targets:
            group.write(target, (value >> i * bits).astype(DTYPES[f"b{bits}"]), active(group))

    return split


def _load(instruction: Instruction, kernel: Kernel) -> Step:
    space, kind = _space(instruction)
    destination, source = instruction.operands[:2]  # a third says how to cache
    targets = [register_of(name, kernel) for name in vector(destination)]
    if space == "param":
        return _load_parameter(instruction, kernel)
    at, active = addresses(source, space, kernel), active_lanes(instruction, kernel)

    def step(group: Group) -> None:
        on = active(group)
        access = group.access(at(group), on, DTYPES[kind], len(targets))
        if space == "shared":
            values = group.shared.load(access)
        else:
            values = group.machine.memory.load(access, instruction.text)
        for i, target in enumerate(targets):
            group.write_active(target, values[:, i], on)

    return step


def _load_parameter(instruction: Instruction, kernel: Kernel) -> Step:
    destination, source = instruction.operands
    target, (name, offset) = register_of(destination, kernel), split_address(source)
    size = DTYPES[instruction.opcode.types[0]].itemsize
    if name not in kernel.parameters or offset or instruction.guard:
        raise arithmetic.unknown(instruction.opcode)

    def step(group: Group) -> None:
        value = np.asarray(group.machine.arguments[name]).reshape(1, 1)
        if value.dtype.itemsize != size:
            raise EmulationError(f"the argument is of type {value.dtype}")
        group.write(target, value, None)

    return step


def _store(instruction: Instruction, kernel: Kernel) -> Step:
    space, kind = _space(instruction)
    destination, source = instruction.operands[:2]
    bits = f"b{8 * DTYPES[kind].itemsize}"  # compared as such: NaN agrees with itself
    reads = [values_of(part, bits, kernel) for part in vector(source)]
    at, active = addresses(destination, space, kernel), active_lanes(instruction, kernel)

    def step(group: Group) -> None:
        on = active(group)
        access = group.access(at(group), on, DTYPES[bits], len(reads))
        values = np.stack([np.broadcast_to(read(group), group.shape) for read in reads], -1)
        values = values.reshape(-1, len(reads)) if on is None else values[on]
        (group.shared if space == "shared" else group.machine.memory).store(access, values)

    return step


def _space(instruction: Instruction) -> tuple[str, str]:
    """State space and element type of a load or store."""
    opcode = instruction.opcode
    spaces = [m for m in opcode.modifiers if m in ("global", "shared", "param")]
    others = [m for m in opcode.modifiers if m not in spaces and not _CACHING.fullmatch(m)]
    written = vector(instruction.operands[0 if opcode.name == "ld" else 1])
    width = [f"v{len(written)}"] if len(written) > 1 else []
    if len(spaces) != 1 or len(opcode.types) != 1 or others != width:
        raise arithmetic.unknown(opcode)
    return spaces[0], opcode.types[0]


def _load_matrix(instruction: Instruction, kernel: Kernel) -> Step:
    """`ldmatrix`: 8 × 8 matrices of 16 bits, a row of 16 bytes for each of the first lanes."""
    count, transposed = _matrices(instruction)
    destination, source = instruction.operands
    targets = [register_of(name, kernel) for name in vector(destination)]
    at = addresses(source, "shared", kernel)

    def step(group: Group) -> None:
        rows = group.shared.load(_matrix_rows(group, at(group), count))
        matrices = rows.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = matrices.reshape(-1, count, WARP, 2).astype(np.uint32)
        values = pairs[..., 0] | pairs[..., 1] << np.uint32(16)
        for i, target in enumerate(targets):
            group.write(target, values[:, i].reshape(group.shape), None)

    return step


def _store_matrix(instruction: Instruction, kernel: Kernel) -> Step:
    """`stmatrix`: the way back of `ldmatrix`."""
    count, transposed = _matrices(instruction)
    destination, source = instruction.operands
    reads = [values_of(name, "b32", kernel) for name in vector(source)]
    at = addresses(destination, "shared", kernel)

    def step(group: Group) -> None:
        values = np.stack([np.broadcast_to(read(group), group.shape) for read in reads])
        lanes = values.reshape(count, -1, WARP).swapaxes(0, 1)  # [warps, matrices, lanes]
        pairs = np.stack([lanes & np.uint32(0xFFFF), lanes >> np.uint32(16)], -1)
        matrices = pairs.astype(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        group.shared.store(_matrix_rows(group, at(group), count), matrices.reshape(-1, 8))

    return step


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    """How many matrices, and whether they are transposed."""
    opcode = instruction.opcode
    counts = [m for m in opcode.modifiers if re.fullmatch("x[124]", m)]
    known = _MATRIX.issuperset(opcode.modifiers) and opcode.types == ("b16",) and len(counts) == 1
    if not known or instruction.guard:
        raise arithmetic.unknown(opcode)
    return int(counts[0][1]), "trans" in opcode.modifiers


def _matrix_rows(group: Group, at: Array, count: int) -> Access:
    """Each of the first 8 · `count` lanes of a warp has the address of a row."""

    def first(a: Array) -> Array:
        return np.broadcast_to(a, group.shape).reshape(-1, WARP)[:, : 8 * count].ravel()

    address, thread, row = (first(a) for a in (at, group.thread, group.row))
    return Access(address, thread, row, group.shape[1], DTYPES["b16"], 8)


def _shuffle(instruction: Instruction, kernel: Kernel) -> Step:
    """`shfl.sync`: the value of another lane of the warp, or one's own where there is none."""
    opcode = instruction.opcode
    if opcode.modifiers[:1] != ("sync",) or opcode.modifiers[1:] not in _SOURCES:
        raise arithmetic.unknown(opcode)
    source = _SOURCES[opcode.modifiers[1:]]
    destination, *operands = instruction.operands
    names = destination.split("|")
    target = register_of(names[0], kernel)
    valid = register_of(names[1], kernel) if len(names) > 1 else None
    reads = [values_of(operand, "u32", kernel) for operand in operands]
    active = active_lanes(instruction, kernel)

    def step(group: Group) -> None:
        value, by, bounds, members = (read(group) for read in reads)
        on = active(group)
        if (members != _FULL_WARP).any() or (on is not None and not on.all()):
            raise EmulationError("only some lanes of a warp take part")
        lane = np.arange(group.shape[1]) % WARP
        segment = (bounds >> 8).astype(np.int64) & 31
        first = lane & segment
        last = first | (bounds.astype(np.int64) & 31 & ~segment)
        other = source(lane, by.astype(np.int64) & 31, first, last, segment)
        exists = other >= last if "up" in opcode.modifiers else other <= last
        index = np.arange(group.shape[1]) - lane + np.where(exists, other, lane)
        index = np.broadcast_to(index, group.shape)
        value = np.broadcast_to(value, group.shape)
        group.write(target, np.take_along_axis(value, index, 1), None)
        if valid is not None:
            group.write(valid, exists, None)

    return step


# Lane to read from, of lane, operand, first and last lane of the segment, and its mask.
_SOURCES: dict[tuple[str, ...], Callable[[Array, Array, Array, Array, Array], Array]] = {
    ("up",): lambda lane, by, first, last, segment: lane - by,
    ("down",): lambda lane, by, first, last, segment: lane + by,
    ("bfly",): lambda lane, by, first, last, segment: lane ^ by,
    ("idx",): lambda lane, by, first, last, segment: first | (by & ~segment),
}


def _barrier(instruction: Instruction, kernel: Kernel) -> Step:
    """Of a warp, `bar.warp.sync`, or of the program, `bar.sync 0`, with all threads."""
    kind, operands = instruction.opcode.modifiers, instruction.operands
    if instruction.guard:
        raise EmulationError("a barrier under a condition is not emulated")
    if kind == ("warp", "sync") and operands == ("-1",):
        return lambda group: group.shared.synchronise_warps()
    if kind == ("sync",) and operands == ("0",):
        return lambda group: group.shared.synchronise()
    raise arithmetic.unknown(instruction.opcode)


def _cache_policy(instruction: Instruction, kernel: Kernel) -> Step:
    """`createpolicy`: a handle for loads that nobody looks at."""
    target = register_of(instruction.operands[0], kernel)
    return lambda group: group.write(target, np.zeros((1, 1), np.uint64), None)


_TRANSLATORS: dict[str, Callable[[Instruction, Kernel], Step]] = {
    "mov": _move,
    "ld": _load,
    "st": _store,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "shfl": _shuffle,
    "bar": _barrier,
    "createpolicy": _cache_policy,
}
