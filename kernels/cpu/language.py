"""A small language in which the CPU kernels are written: vectors, arrays and loops → LLVM IR.

A kernel is built by ordinary Python code that runs once per shape: a Python `for` is unrolled,
`Kernel.loop` becomes a loop, and `+ − · /` on `Vec` and `Int` write instructions. A `Vec` has 16
lanes of float32 or 8 of float64; LLVM maps it to one zmm, two ymm, or several NEON registers, so
no compiler is needed at install. Loads and stores take the number of lanes they may touch: the
tail of a row of any length stays inside one masked instruction, and no array needs padding.

    k = Kernel("scale", torch.float32, torch.int32)
    x, y = k.matrix("x"), k.matrix("y")
    with k.tasks() as i:                       # every i in [0, n_tasks), shared by the threads
        y.row(i).store(x.row(i).load(5) * k.splat(2.0), 5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import llvmlite.ir as ir
import torch

_I1, _I8, _I32, _I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER = ir.PointerType()
REGISTER_BYTES = 64


@dataclass(frozen=True)
class FloatFormat:
    """What the vector code has to know of an IEEE type."""

    scalar: ir.Type
    bits: int
    mantissa: int  # stored bits
    exp_low: float  # below it exp would leave the normal range
    exp_degree: int  # Taylor degree of exp on |r| ≤ ln(2)/2, error below one rounding

    @property
    def bytes(self) -> int:
        """Bytes of one element."""
        return self.bits // 8

    @property
    def lanes(self) -> int:
        """Elements of one `Vec`."""
        return REGISTER_BYTES // self.bytes


FORMATS = {
    torch.float32: FloatFormat(ir.FloatType(), 32, 23, -86.0, 7),
    torch.float64: FloatFormat(ir.DoubleType(), 64, 52, -707.0, 13),
}


class Kernel:
    """A kernel under construction: `void name(const int64 *arguments, int64 thread)`.

    Asking for an argument (`matrix`, `vector`, `indices`, `longs`, `number`) declares it;
    `arguments` lists them as (name, "address" | "stride" | "number") for the launcher.
    """

    def __init__(self, name: str, dtype: torch.dtype, index: torch.dtype) -> None:
        self.name = name
        self.format = FORMATS[dtype]
        self.lanes = self.format.lanes
        self.index = _I32 if index == torch.int32 else _I64
        self.vector_type = ir.VectorType(self.format.scalar, self.lanes)
        self.arguments: list[tuple[str, str]] = []
        self._declared: dict[tuple[str, str], ir.Value] = {}
        self.module = ir.Module(name)
        signature = ir.FunctionType(ir.VoidType(), [_POINTER, _I64])
        self.function = ir.Function(self.module, signature, name)
        # `entry` loads arguments and holds variables; the program itself starts in `body`.
        self._entry = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.builder = ir.IRBuilder(self.function.append_basic_block("body"))
        self._body = self.builder.block
        self.thread = Int(self, self.function.args[1])

    def source(self) -> str:
        """The finished kernel as LLVM IR."""
        if not self.builder.block.is_terminated:
            self.builder.ret_void()
            self._entry.branch(self._body)
        return str(self.module)

    # Arguments

    def _argument(self, name: str, kind: str) -> ir.Value:
        key = (name, kind)
        if key not in self._declared:
            slot = ir.Constant(_I64, len(self.arguments))
            arguments = self.function.args[0]
            at = self._entry.gep(arguments, [slot], source_etype=_I64)
            type_ = _POINTER if kind == "address" else _I64
            self._declared[key] = self._entry.load(at, typ=type_)
            self.arguments.append(key)
        return self._declared[key]

    def matrix(self, name: str) -> Matrix:
        """A tensor `[rows, …]` with contiguous rows and any row stride."""
        stride = Int(self, self._argument(name, "stride"))
        return Matrix(Floats(self, self._argument(name, "address")), stride)

    def vector(self, name: str) -> Floats:
        """A contiguous float tensor."""
        return Floats(self, self._argument(name, "address"))

    def indices(self, name: str) -> Ints:
        """A contiguous tensor of the graph's index type."""
        return Ints(self, self._argument(name, "address"), self.index)

    def longs(self, name: str) -> Ints:
        """A contiguous int64 tensor."""
        return Ints(self, self._argument(name, "address"), _I64)

    def number(self, name: str) -> Int:
        """An integer."""
        return Int(self, self._argument(name, "number"))

    # Constants and variables

    def integer(self, value: Int | int) -> Int:
        """`value` as a running integer."""
        return value if isinstance(value, Int) else Int(self, ir.Constant(_I64, value))

    def splat(self, value: float) -> Vec:
        """A constant in every lane."""
        return self.constant([value] * self.lanes)

    def constant(self, values: Sequence[float]) -> Vec:
        """A constant for each lane."""
        return Vec(self, ir.Constant(self.vector_type, [float(v) for v in values]))

    def variable(self, value: Vec) -> Variable:
        """A vector that loops may change; LLVM keeps it in a register where it can."""
        return Variable(value, self._entry.alloca(self.vector_type))

    # Control flow

    @contextmanager
    def loop(self, start: Int | int, stop: Int | int, step: int = 1) -> Iterator[Int]:
        """`for i in range(start, stop, step)` in the running kernel."""
        b = self.builder
        start, stop = self.integer(start), self.integer(stop)
        before = b.block
        head, body, after = (b.append_basic_block(f"loop.{n}") for n in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(_I64)
        i.add_incoming(start.value, before)
        b.cbranch(b.icmp_signed("<", i, stop.value), body, after)
        b.position_at_end(body)
        yield Int(self, i)
        i.add_incoming(b.add(i, ir.Constant(_I64, step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def when(self, condition: ir.Value) -> Iterator[None]:
        """`if condition:` in the running kernel."""
        with self.builder.if_then(condition):
            yield

    @contextmanager
    def tasks(self) -> Iterator[Int]:
        """Tasks 0 … n_tasks − 1, each given to the first thread that is free.

        Who runs a task never changes what it writes, so results do not depend on the threads.
        """
        b = self.builder
        counter = self._argument("counter", "address")
        n_tasks = self.number("n_tasks")
        head, body, after = (b.append_basic_block(f"task.{n}") for n in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        task = b.atomic_rmw("add", counter, ir.Constant(_I64, 1), "monotonic")
        b.cbranch(b.icmp_signed("<", task, n_tasks.value), body, after)
        b.position_at_end(body)
        yield Int(self, task)
        b.branch(head)
        b.position_at_end(after)

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        """Call one of LLVM's intrinsic functions."""
        function = self.module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(self.module, signature, name)
        return self.builder.call(function, arguments)


class Int:
    """A 64-bit integer of the running kernel."""

    def __init__(self, kernel: Kernel, value: ir.Value) -> None:
        self.kernel, self.value = kernel, value

    def _with(self, operation: Callable[[ir.Value, ir.Value], ir.Value], other: Int | int) -> Int:
        return Int(self.kernel, operation(self.value, self.kernel.integer(other).value))

    def __add__(self, other: Int | int) -> Int:
        return self._with(self.kernel.builder.add, other)

    def __sub__(self, other: Int | int) -> Int:
        return self._with(self.kernel.builder.sub, other)

    def __mul__(self, other: Int | int) -> Int:
        return self._with(self.kernel.builder.mul, other)

    def __floordiv__(self, other: Int | int) -> Int:
        return self._with(self.kernel.builder.udiv, other)  # of numbers that are not negative

    def __le__(self, other: Int | int) -> ir.Value:
        return self.kernel.builder.icmp_signed("<=", self.value, self.kernel.integer(other).value)

    def __gt__(self, other: Int | int) -> ir.Value:
        return self.kernel.builder.icmp_signed(">", self.value, self.kernel.integer(other).value)

    def minimum(self, other: Int | int) -> Int:
        """The smaller of the two."""
        other = self.kernel.integer(other)
        smaller = self.kernel.builder.select(self <= other, self.value, other.value)
        return Int(self.kernel, smaller)


class Vec:
    """`lanes` floats of the running kernel."""

    def __init__(self, kernel: Kernel, value: ir.Value) -> None:
        self.kernel, self.value = kernel, value

    def _with(self, operation: Callable[[ir.Value, ir.Value], ir.Value], other: Vec) -> Vec:
        return Vec(self.kernel, operation(self.value, other.value))

    def __add__(self, other: Vec) -> Vec:
        return self._with(self.kernel.builder.fadd, other)

    def __sub__(self, other: Vec) -> Vec:
        return self._with(self.kernel.builder.fsub, other)

    def __mul__(self, other: Vec) -> Vec:
        return self._with(self.kernel.builder.fmul, other)

    def __truediv__(self, other: Vec) -> Vec:
        return self._with(self.kernel.builder.fdiv, other)

    def shuffle(self, lanes: Sequence[int], other: Vec | None = None) -> Vec:
        """Lane `l` of the result is lane `lanes[l]` of `self` followed by `other`."""
        pick = ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))
        second = (other or self).value
        return Vec(self.kernel, self.kernel.builder.shuffle_vector(self.value, second, pick))

    def first(self, n: Int, rest: Vec) -> Vec:
        """The first `n` lanes of `self`, then those of `rest`."""
        mask = _first_lanes(self.kernel, n)
        return Vec(self.kernel, self.kernel.builder.select(mask, self.value, rest.value))


class Variable:
    """A vector that is assigned more than once."""

    def __init__(self, value: Vec, place: ir.Value) -> None:
        self.kernel, self._place = value.kernel, place
        self.value = value

    @property
    def value(self) -> Vec:
        """Its present value."""
        return Vec(self.kernel, self.kernel.builder.load(self._place, typ=self.kernel.vector_type))

    @value.setter
    def value(self, value: Vec) -> None:
        self.kernel.builder.store(value.value, self._place)


class Ints:
    """An array of integers."""

    def __init__(self, kernel: Kernel, address: ir.Value, element: ir.IntType) -> None:
        self.kernel, self._address, self._element = kernel, address, element

    def __getitem__(self, i: Int | int) -> Int:
        b = self.kernel.builder
        at = b.gep(self._address, [self.kernel.integer(i).value], source_etype=self._element)
        value = b.load(at, typ=self._element)
        return Int(self.kernel, value if self._element is _I64 else b.sext(value, _I64))


class Floats:
    """An array of floats, or the rest of one from some element on."""

    def __init__(self, kernel: Kernel, address: ir.Value) -> None:
        self.kernel, self._address = kernel, address

    def at(self, i: Int | int) -> Floats:
        """The array from element `i` on."""
        k = self.kernel
        at = k.builder.gep(self._address, [k.integer(i).value], source_etype=k.format.scalar)
        return Floats(k, at)

    def load(self, lanes: int | None = None) -> Vec:
        """The first `lanes` elements (all by default), then zeros; nothing beyond is read."""
        k = self.kernel
        if lanes is None or lanes == k.lanes:
            value = k.builder.load(self._address, typ=k.vector_type, align=k.format.bytes)
            return Vec(k, value)
        return self._masked_load(_lane_mask(k, range(lanes)), k.splat(0.0))

    def load_first(self, n: Int) -> Vec:
        """The first `n` elements, then zeros; `n` is known only to the running kernel."""
        return self._masked_load(_first_lanes(self.kernel, n), self.kernel.splat(0.0))

    def load_into(self, vec: Vec, start: int, lanes: int) -> Vec:
        """`vec` with its lanes from `start` on replaced by the first `lanes` elements."""
        k = self.kernel
        mask = _lane_mask(k, range(start, start + lanes))
        if lanes & (lanes - 1) == 0 and start % lanes == 0:
            # A narrow load, repeated over the register: it never straddles cache lines in vain.
            type_ = ir.VectorType(k.format.scalar, lanes)
            narrow = k.builder.load(self._address, typ=type_, align=k.format.bytes)
            pick = ir.Constant(ir.VectorType(_I32, k.lanes), [i % lanes for i in range(k.lanes)])
            wide = k.builder.shuffle_vector(narrow, narrow, pick)
            return Vec(k, k.builder.select(mask, wide, vec.value))
        return self.at(-start)._masked_load(mask, vec)  # masked lanes are not touched

    def _masked_load(self, mask: ir.Value, rest: Vec) -> Vec:
        k = self.kernel
        name = f"llvm.masked.load.v{k.lanes}f{k.format.bits}.p0"
        align = ir.Constant(_I32, k.format.bytes)
        return Vec(k, k.intrinsic(name, k.vector_type, [self._address, align, mask, rest.value]))

    def splat(self) -> Vec:
        """The first element in every lane."""
        k = self.kernel
        scalar = k.builder.load(self._address, typ=k.format.scalar)
        undefined = ir.Constant(k.vector_type, ir.Undefined)
        one = Vec(k, k.builder.insert_element(undefined, scalar, ir.Constant(_I32, 0)))
        return one.shuffle([0] * k.lanes)

    def store(self, vec: Vec, lanes: int | None = None, *, streams: bool = False) -> None:
        """Write the first `lanes` lanes (all by default) and nothing beyond.

        With `streams`, past the caches: all lanes, to an address that a register's width divides.
        """
        k = self.kernel
        if streams:
            place = k.builder.store(vec.value, self._address, align=k.lanes * k.format.bytes)
            one = k.module.add_metadata([ir.Constant(_I32, 1)])
            place.set_metadata("nontemporal", one)
        elif lanes is None or lanes == k.lanes:
            k.builder.store(vec.value, self._address, align=k.format.bytes)
        else:
            self._masked_store(vec, _lane_mask(k, range(lanes)))

    def store_first(self, vec: Vec, n: Int) -> None:
        """Write the first `n` lanes; `n` is known only to the running kernel."""
        self._masked_store(vec, _first_lanes(self.kernel, n))

    def _masked_store(self, vec: Vec, mask: ir.Value) -> None:
        k = self.kernel
        name = f"llvm.masked.store.v{k.lanes}f{k.format.bits}.p0"
        align = ir.Constant(_I32, k.format.bytes)
        k.intrinsic(name, ir.VoidType(), [vec.value, self._address, align, mask])

    def prefetch(self, n: int) -> None:
        """Ask for the cache lines of the first `n` elements."""
        k = self.kernel
        read, keep, data = ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)
        for start in range(0, n, k.lanes):  # a register is as wide as a cache line
            line = self.at(start)._address
            k.intrinsic("llvm.prefetch.p0", ir.VoidType(), [line, read, keep, data])


@dataclass(frozen=True)
class Matrix:
    """Rows of floats, `stride` elements apart."""

    first: Floats
    stride: Int

    def row(self, i: Int) -> Floats:
        """Row `i`."""
        return self.first.at(i * self.stride)


@dataclass(frozen=True)
class Chunk:
    """A register's worth of a row: `lanes` elements from `start` on."""

    start: int
    lanes: int


def chunks(n: int, lanes: int, start: int = 0) -> list[Chunk]:
    """`n` elements from `start` on, cut into registers; the last may be partial."""
    return [Chunk(start + i, min(lanes, n - i)) for i in range(0, n, lanes)]


def _lane_mask(k: Kernel, active: range) -> ir.Value:
    return ir.Constant(ir.VectorType(_I1, k.lanes), [int(i in active) for i in range(k.lanes)])


def _first_lanes(k: Kernel, n: Int) -> ir.Value:
    b = k.builder
    numbers = ir.VectorType(_I32, k.lanes)
    zero = ir.Constant(_I32, 0)
    count = b.trunc(n.minimum(k.lanes).value, _I32)
    counts = b.insert_element(ir.Constant(numbers, ir.Undefined), count, zero)
    counts = b.shuffle_vector(counts, counts, ir.Constant(numbers, [0] * k.lanes))
    return b.icmp_signed("<", ir.Constant(numbers, list(range(k.lanes))), counts)
