"""Machine code of an NVIDIA GPU: instructions, loops, and what a warp waits for.

Read from `nvdisasm -c -hex`. Since Volta an instruction is two 64-bit words, and the second has its
schedule, which the compiler fixed: after how many cycles the next one may issue, which of six
scoreboards it holds until its result is there, and on which scoreboards it waits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

LANES = 32
_NO_SCOREBOARD = 7
# Cycles from issue to result of what is not a global load but holds a scoreboard (shuffle, shared
# memory, exponential): all lie near 25 on both architectures; the 400 of memory hide the rest.
_SHORT_LATENCY = 25

_LABEL = re.compile(r"^\s*(\.L_\w+):")
_FIRST_WORD = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_PREDICATE = re.compile(r"^@!?U?P(?:\d+|T)\s+")
_BRANCH = re.compile(r"^BRA\b.*?(?:`\((\.L_\w+)\)|\b0x([0-9a-f]+))")
_CONDITION = re.compile(r"\bU?P\d")  # in front of the opcode or behind it
_WIDTH = re.compile(r"\.(?:U|S)?(8|16|64|128|256)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction. stall: cycles until the next may issue; waits: a bit per scoreboard."""

    address: int
    label: str | None
    text: str
    stall: int
    scoreboard: int | None
    waits: int

    @cached_property
    def opcode(self) -> str:
        """With its modifiers, without a predicate: `LDG.E.128`."""
        return _PREDICATE.sub("", self.text).split()[0]

    @property
    def is_load(self) -> bool:
        """From global memory, to registers or (`LDGSTS`) to shared memory."""
        return self.opcode.startswith("LDG") and not self.opcode.startswith("LDGDEPBAR")

    @property
    def bytes(self) -> int:
        """Moved by one lane of a load or store."""
        width = _WIDTH.search(self.opcode)
        return int(width.group(1)) // 8 if width else 4


Code = Sequence[Instruction]


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly, without the padding behind the last."""
    code: list[Instruction] = []
    label = pending = None
    for line in text.splitlines():
        if found := _LABEL.match(line):
            label = found.group(1)
        elif found := _FIRST_WORD.match(line):
            pending = (int(found.group(1), 16), found.group(2))
        elif pending and (found := _SECOND_WORD.match(line)):
            word = int(found.group(1), 16)
            scoreboard = word >> 46 & 7
            code.append(
                Instruction(
                    *(pending[0], label, pending[1]),
                    stall=word >> 41 & 15,
                    scoreboard=None if scoreboard == _NO_SCOREBOARD else scoreboard,
                    waits=word >> 52 & 63,
                )
            )
            label = pending = None
    return [i for i in code if i.opcode != "NOP"]


def innermost_loops(code: Code) -> list[range]:
    """Positions in `code` of each loop that holds no other, in order.

    A loop reaches from the target of a backward branch to that branch. The endless one behind the
    exit, a branch to itself, is none.
    """
    ends: dict[int, int] = {}  # several branches back to one target are one loop
    for at, target in _targets(code).items():
        if target < at:
            ends[target] = at
    spans = [range(start, end + 1) for start, end in sorted(ends.items())]
    return [
        s for s in spans
        if not any(o is not s and s.start <= o.start and o.stop <= s.stop for o in spans)
    ]  # fmt: skip


def longest_path(code: Code, through: Sequence[range]) -> list[int]:
    """Positions that a program passes from the first to its exit, if it takes the longest way.

    Loops are taken once; of two ways, the one with more instructions of the loops `through` is the
    longer.
    """
    inside = {at for loop in through for at in loop}
    targets, after = _targets(code), len(code)
    length, following = [0] * (after + 1), [after] * after
    for at in reversed(range(after)):
        ways = {at + 1}
        if code[at].opcode.startswith(("BRA", "EXIT")):
            target = targets.get(at, after)
            is_certain = not _CONDITION.search(code[at].text) and target > at
            ways = {target} if is_certain else {target, at + 1}
        following[at] = max((w for w in ways if w > at), key=lambda way: length[way])
        length[at] = length[following[at]] + (after if at in inside else 1)
    path, at = [], 0
    while at < after:
        path.append(at)
        at = following[at]
    return path


def _targets(code: Code) -> dict[int, int]:
    """Position of each branch → that of the instruction it jumps to."""
    by_label = {i.label: at for at, i in enumerate(code) if i.label}
    by_address = {i.address: at for at, i in enumerate(code)}
    targets: dict[int, int] = {}
    for at, instruction in enumerate(code):
        if found := _BRANCH.match(_PREDICATE.sub("", instruction.text)):
            label, address = found.groups()
            target = by_label.get(label) if label else by_address.get(int(address, 16))
            if target is not None:
                targets[at] = target
    return targets


def count(code: Code, pattern: str) -> int:
    """Instructions whose opcode begins with the pattern."""
    compiled = re.compile(pattern)
    return sum(bool(compiled.match(i.opcode)) for i in code)


def load_bytes(code: Code, *, at_least: int = 0) -> int:
    """Bytes that one pass of a warp loads, in loads of `at_least` that many bytes a lane."""
    return LANES * sum(i.bytes for i in code if i.is_load and i.bytes >= at_least)


def bytes_in_flight(body: Code) -> int:
    """The most bytes that a warp has asked for and not yet waited for, in a turn of a loop.

    A load is in flight from its issue until an instruction waits on its scoreboard. The loop is
    walked twice: what the first turn left open is in flight in the second.
    """
    open_bytes: dict[int, int] = {}
    most = 0
    for instruction in [*body, *body]:
        for board in list(open_bytes):
            if instruction.waits >> board & 1:
                del open_bytes[board]
        if instruction.is_load and instruction.scoreboard is not None:
            board = instruction.scoreboard
            open_bytes[board] = open_bytes.get(board, 0) + LANES * instruction.bytes
            most = max(most, sum(open_bytes.values()))
    return most


def cycles(code: Code, latency: float, *, turns: int = 1) -> float:
    """Cycles of one warp, alone, per turn: issue in order, and wait for the scoreboards.

    Branches are not followed. Every load takes `latency` cycles. With several turns, the first is
    left out: the loop then runs as it does in the middle.
    """
    ready = [0.0] * 8
    now = started = 0.0
    for turn in range(turns):
        if turn == 1:
            started = now
        for instruction in code:
            for board in range(6):
                if instruction.waits >> board & 1:
                    now = max(now, ready[board])
            if instruction.scoreboard is not None:
                takes = latency if instruction.is_load else _SHORT_LATENCY
                # a scoreboard counts: it is free when the last of its instructions is done
                ready[instruction.scoreboard] = max(ready[instruction.scoreboard], now + takes)
            now += max(1, instruction.stall)
    return (now - started) / max(1, turns - 1)
