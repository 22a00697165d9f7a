"""The memories of an emulated launch, and what no correct kernel does to them.

Addresses are those of the host: a kernel reads and writes the tensors of its launch where they lie.
"""

import ctypes
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tests.gpu.ptx.arithmetic import Array
from tests.gpu.ptx.parser import EmulationError

SECTOR = 32  # bytes; a GPU moves no less
WARP = 32  # lanes
_NOBODY = -1


class Access(NamedTuple):
    """What the active lanes of one instruction touch, `width` elements of `dtype` each.

    address: [L], bytes. thread: [L], counted through all programs, `threads` in each. row: [L],
    position of the lane's program among those that run together.
    """

    address: Array
    thread: Array
    row: Array
    threads: int
    dtype: np.dtype[Any]
    width: int

    @property
    def size(self) -> int:
        """Bytes of one lane."""
        return self.dtype.itemsize * self.width

    def check(self, wrong: Array, problem: str) -> None:
        """Raise if any lane is `wrong`; `{at}` in the text stands for its address."""
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            program, thread = divmod(int(self.thread[lane]), self.threads)
            problem = problem.replace("{at}", str(self.address[lane]))
            raise EmulationError(f"program {program}, thread {thread}: {problem}")

    def check_alignment(self) -> None:
        """A vector begins at a multiple of its size, or the device stops."""
        self.check(self.address % self.size != 0, f"{self.size} bytes at {{at}} are misaligned")

    def units(self, base: int, unit: int) -> Array:
        """Which `unit`-byte parts are touched, counted from `base`: [L, size / unit]."""
        return ((self.address - base) // unit)[:, None] + np.arange(self.size // unit)

    def distinct_bytes(self) -> int:
        """What the lanes of a warp ask for, each address once, at one number of bytes per lane."""
        return len(np.unique((self.thread // WARP << 44) | self.address // self.size)) * self.size

    def sectors(self) -> int:
        """How many sectors move: lanes of a warp share them, and no access spans two."""
        warp, sector = self.thread // WARP, self.address // SECTOR
        return len(np.unique((warp << 44) | sector))  # an address has at most 48 bits


class GlobalMemory:
    """The tensors of one launch, watched.

    Every access must lie inside a tensor and be aligned. No two threads may store different values
    to one address, and no program may load what another stores, in whichever order they ran.
    """

    def __init__(self, tensors: Mapping[str, Tensor], granule: int) -> None:
        """`granule`: bytes of the smallest element that the kernel touches."""
        self.spans = sorted(_span(tensor, name) for name, tensor in tensors.items())
        self.begin, self.end = _merged(self.spans)
        self.base = int(self.begin[0]) // 16 * 16
        size = -(-(int(self.end[-1]) - self.base) // 16) * 16
        # One array over the whole range of addresses, tensors and what lies between them: only what
        # the bounds check has let through is ever touched.
        self.bytes: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base))
        # Who stored each granule last, those of one tensor after those of another.
        self.granule = granule
        counts = (self.end - self.begin) // granule + 2
        self.first = np.concatenate([[0], counts.cumsum()])
        self.writer = np.full(int(self.first[-1]), _NOBODY, np.int64)
        self.loads: list[tuple[str, Access, Array]] = []
        self.sectors_loaded = self.sectors_stored = 0
        self.bytes_loaded: Counter[int] = Counter()  # by bytes of one lane

    def load(self, access: Access, text: str) -> Array:
        """Values of the active lanes, [L, width]; `text` is the instruction, for messages."""
        granules = self._checked(access)
        self.loads.append((text, access, granules))
        self.sectors_loaded += access.sectors()
        self.bytes_loaded[access.size] += access.distinct_bytes()
        index = access.units(self.base, access.dtype.itemsize)
        values: Array = self.bytes.view(access.dtype)[index]
        return values

    def store(self, access: Access, values: Array) -> None:
        """Write [L, width] values."""
        granules, thread = self._checked(access), access.thread[:, None]
        index = access.units(self.base, access.dtype.itemsize)
        memory = self.bytes.view(access.dtype)
        writer = self.writer[granules]
        taken = ((writer != _NOBODY) & (writer != thread)).any(1)
        problem = "another thread stores another value at {at}"
        access.check(taken & (memory[index] != values).any(1), problem)
        memory[index] = values
        access.check((memory[index] != values).any(1), problem)
        self.writer[granules] = thread
        self.sectors_stored += access.sectors()

    def finish(self) -> None:
        """After the last program: did one load what another stored?"""
        for text, access, granules in self.loads:
            writer, program = self.writer[granules], access.thread // access.threads
            foreign = (writer != _NOBODY) & (writer // access.threads != program[:, None])
            access.check(foreign.any(1), f"`{text}` loads what another program stores")

    def _checked(self, access: Access) -> Array:
        """Granules of every access, [L, size / granule], once it is aligned and in bounds."""
        access.check_alignment()
        span = np.maximum(np.searchsorted(self.begin, access.address, "right") - 1, 0)
        outside = access.address < self.begin[span]
        outside |= access.address + access.size > self.end[span]
        if outside.any():
            near = self._near(int(access.address[outside][0]))
            access.check(outside, f"{access.size} bytes at {near} are out of bounds")
        origin: Array = self.first[span] - self.begin[span] // self.granule
        return origin[:, None] + access.units(0, self.granule)

    def _near(self, address: int) -> str:
        """An address as offset from the tensor that begins last before it."""
        before = [span for span in self.spans if span[0] <= address]
        begin, _, name = before[-1] if before else self.spans[0]
        return f"`{name}` {'+' if address >= begin else '-'} {abs(address - begin)}"


class SharedMemory:
    """The shared memory of programs that run together, [programs, bytes], watched.

    Between a write and any other access to a byte by another thread there must be a barrier: of the
    warp if both are of one warp, of the program if not.
    """

    def __init__(self, programs: int, size: int) -> None:
        shape = (programs, size)
        self.bytes = np.full(shape, 0xFF, np.uint8)  # NaN, until written
        # Since the program's last barrier: the thread that wrote a byte, and at which time, counted
        # in barriers; the first and the last thread that read it.
        self.time = 0
        self.writer = np.full(shape, _NOBODY, np.int64)
        self.written_at = np.zeros(shape, np.int64)
        self.first_reader, self.last_reader = _no_readers(shape)
        # Its readers since the last barrier of either kind.
        self.first_recent, self.last_recent = _no_readers(shape)

    def select(self, keep: Array) -> "SharedMemory":
        """A copy for some of the programs."""
        part = SharedMemory(0, 0)
        for name, value in vars(self).items():
            setattr(part, name, value[keep] if isinstance(value, np.ndarray) else value)
        return part

    def synchronise_warps(self) -> None:
        """`bar.warp.sync`: what a warp did before, its lanes see."""
        self.time += 1
        self.first_recent, self.last_recent = _no_readers(self.bytes.shape)

    def synchronise(self) -> None:
        """`bar.sync`: what the program did before, all its threads see."""
        self.synchronise_warps()
        self.writer = np.full(self.bytes.shape, _NOBODY, np.int64)
        self.first_reader, self.last_reader = _no_readers(self.bytes.shape)

    def load(self, access: Access) -> Array:
        """Values of the active lanes, [L, width]."""
        at, thread = self._checked(access), access.thread[:, None]
        _no_race(access, self._written_by_another(at, thread), "reads what another wrote")
        for first in (self.first_reader, self.first_recent):
            np.minimum.at(first, at, thread)
        for last in (self.last_reader, self.last_recent):
            np.maximum.at(last, at, thread)
        return self.bytes[at].view(access.dtype)

    def store(self, access: Access, values: Array) -> None:
        """Write [L, width] values."""
        at, thread = self._checked(access), access.thread[:, None]
        new = np.ascontiguousarray(values).view(np.uint8)
        written = self._written_by_another(at, thread) & (self.bytes[at] != new)
        _no_race(access, written, "writes what another wrote")
        _no_race(access, self._read_by_another(at, thread), "writes what another read")
        self.bytes[at], self.writer[at], self.written_at[at] = new, thread, self.time
        # Lanes of a warp that hold copies of a sum all write theirs: they must be the same.
        overruled = self.bytes[at] != new
        _no_race(access, overruled, "writes what another writes")

    def _written_by_another(self, at: tuple[Array, Array], thread: Array) -> Array:
        writer = self.writer[at]
        unseen = (writer // WARP != thread // WARP) | (self.written_at[at] == self.time)
        foreign: Array = (writer != _NOBODY) & (writer != thread) & unseen
        return foreign

    def _read_by_another(self, at: tuple[Array, Array], thread: Array) -> Array:
        warp = thread // WARP
        return (
            (self.first_reader[at] // WARP < warp)
            | (self.last_reader[at] // WARP > warp)
            | (self.first_recent[at] < thread)
            | (self.last_recent[at] > thread)
        )

    def _checked(self, access: Access) -> tuple[Array, Array]:
        """Row, [L, 1], and byte, [L, size], of every byte touched."""
        access.check_alignment()
        size = self.bytes.shape[1]
        outside = (access.address < 0) | (access.address + access.size > size)
        access.check(outside, f"{access.size} bytes at {{at}} of {size} of shared memory")
        return access.row[:, None], access.units(0, 1)


def _no_readers(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """First and last thread of none: neither passes for another thread."""
    return np.full(shape, np.iinfo(np.int64).max), np.full(shape, _NOBODY, np.int64)


def _no_race(access: Access, race: Array, problem: str) -> None:
    access.check(
        np.asarray(race.any(1)), f"race at {{at}} of shared memory: {problem}, without a barrier"
    )


def _span(tensor: Tensor, name: str) -> tuple[int, int, str]:
    """First byte of a tensor, the one after its last, and its name."""
    begin, size = tensor.data_ptr(), 0
    if tensor.numel():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size = sum((length - 1) * stride for length, stride in steps) + 1
    return begin, begin + size * tensor.element_size(), name


def _merged(spans: list[tuple[int, int, str]]) -> tuple[Array, Array]:
    """Begins and ends of sorted spans; those that overlap, as views of one storage do, are one."""
    merged: list[list[int]] = []
    for begin, end, _ in spans:
        if merged and begin < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        elif end > begin:
            merged.append([begin, end])
    if not merged:
        raise EmulationError("a launch without any memory: nothing could come of it")
    bounds = np.array(merged, np.int64)
    return bounds[:, 0], bounds[:, 1]
