"""The text of one PTX kernel, as Triton writes it, taken apart into instructions."""

import re
from dataclasses import dataclass
from typing import NamedTuple

# Every type that an opcode may end in. Those without a numpy type only occur in conversions.
TYPES = frozenset(
    {"pred", "b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64"}
    | {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2"}
)


class EmulationError(RuntimeError):
    """PTX that is not understood, or that does what no correct kernel does."""


class Opcode(NamedTuple):
    """`mad.wide.s32` is the name `mad`, the modifier `wide` and the type `s32`."""

    name: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Opcode":
        """Split at the dots; the types come last."""
        name, *rest = text.split(".")
        first = len(rest)
        while first > 0 and rest[first - 1] in TYPES:
            first -= 1
        return cls(name, tuple(rest[:first]), tuple(rest[first:]))

    def __str__(self) -> str:
        return ".".join((self.name, *self.modifiers, *self.types))


@dataclass(frozen=True)
class Instruction:
    """One statement. guard: the predicate under which it acts, `%p1` or `!%p1`; None: always."""

    line: int
    text: str
    guard: str | None
    opcode: Opcode
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """A kernel without its debug information.

    parameters: in the order of the launch. threads: per program. registers: type by prefix, as in
    `%rd` → `b64`. labels: the instruction that follows each.
    """

    name: str
    parameters: tuple[str, ...]
    threads: int
    registers: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


class Address(NamedTuple):
    """`[%rd1+16]`: a register or a symbol, and bytes beyond it."""

    base: str
    offset: int


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)^\{(.*?)^\}", re.DOTALL | re.MULTILINE)
_PARAMETER = re.compile(r"\.param\s+[^,]*?(\w+)\s*(?:,|$)")
_THREADS = re.compile(r"\.reqntid\s+(\d+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>")
_COMMENT = re.compile(r"//.*")
_LABEL = re.compile(r"(\$?\w+):\s*")
_STATEMENT = re.compile(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")


def parse(ptx: str) -> Kernel:
    """The only kernel of a PTX module."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise EmulationError("no `.entry` in this PTX")
    name, parameters, directives, body = entry.groups()
    threads = _THREADS.search(directives)
    if threads is None:
        raise EmulationError(f"{name}: no `.reqntid`, so the number of threads is unknown")
    instructions, labels = _statements(body, ptx.count("\n", 0, entry.start(4)) + 1)
    return Kernel(
        name=name,
        parameters=tuple(_PARAMETER.findall(_COMMENT.sub("", parameters))),
        threads=int(threads[1]),
        registers={prefix: kind for kind, prefix in _REGISTERS.findall(body)},
        instructions=tuple(instructions),
        labels=labels,
    )


def _statements(body: str, first_line: int) -> tuple[list[Instruction], dict[str, int]]:
    """Triton ends each statement on the line where it begins."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(body.split("\n"), first_line):
        text = _COMMENT.sub("", line).strip()
        while label := _LABEL.match(text):
            labels[label[1]] = len(instructions)
            text = text[label.end() :]
        for statement in text.split(";"):
            statement = " ".join(statement.lstrip("{} \t").split())  # less the braces of a scope
            if statement and not statement.startswith("."):
                instructions.append(_instruction(statement, number))
    return instructions, labels


def _instruction(text: str, line: int) -> Instruction:
    match = _STATEMENT.fullmatch(text)
    if match is None:
        raise EmulationError(f"PTX line {line}: `{text}` is no instruction")
    guard, opcode, operands = match.groups()
    return Instruction(line, text, guard, Opcode.parse(opcode), tuple(_OPERAND.findall(operands)))


def vector(operand: str) -> tuple[str, ...]:
    """The registers of `{%r1, %r2}`, or the one of `%r1`."""
    return tuple(part.strip() for part in operand.strip("{}").split(","))


def split_address(operand: str) -> Address:
    """Base and offset of `[%rd1 + 16]`."""
    match = _ADDRESS.fullmatch(operand)
    if match is None:
        raise EmulationError(f"`{operand}` is no address")
    return Address(match[1], int(match[2] or 0))
