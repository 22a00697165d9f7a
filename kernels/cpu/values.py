"""The values that a CPU kernel computes with: integers, vectors, arrays in memory.

Each writes the instruction for what is done to it through the kernel that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Builder:
    """Where values write their instructions: the part of a `Kernel` that they know."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.format = FORMATS[dtype]
        self.lanes = self.format.lanes
        self.vector_type = ir.VectorType(self.format.scalar, self.lanes)
        self.module = ir.Module(name)
        self.builder = ir.IRBuilder()

    def integer(self, value: Int | int) -> Int:
        """`value` as a running integer."""
        return value if isinstance(value, Int) else Int(self, ir.Constant(_I64, value))

    def splat(self, value: float) -> Vec:
        """A constant in every lane."""
        return self.constant([value] * self.lanes)

    def constant(self, values: Sequence[float]) -> Vec:
        """A constant for each lane."""
        return Vec(self, ir.Constant(self.vector_type, [float(v) for v in values]))

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        """Call one of LLVM's intrinsic functions."""
        function = self.module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(self.module, signature, name)
        return self.builder.call(function, arguments)


class Int:
    """A 64-bit integer of the running kernel."""

    def __init__(self, kernel: Builder, value: ir.Value) -> None:
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

    def __init__(self, kernel: Builder, value: ir.Value) -> None:
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

    def __init__(self, kernel: Builder, address: ir.Value, element: ir.IntType) -> None:
        self.kernel, self._address, self._element = kernel, address, element

    def __getitem__(self, i: Int | int) -> Int:
        b = self.kernel.builder
        at = b.gep(self._address, [self.kernel.integer(i).value], source_etype=self._element)
        value = b.load(at, typ=self._element)
        return Int(self.kernel, value if self._element is _I64 else b.sext(value, _I64))


class Floats:
    """An array of floats, or the rest of one from some element on."""

    def __init__(self, kernel: Builder, address: ir.Value) -> None:
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


def _lane_mask(k: Builder, active: range) -> ir.Value:
    return ir.Constant(ir.VectorType(_I1, k.lanes), [int(i in active) for i in range(k.lanes)])


def _first_lanes(k: Builder, n: Int) -> ir.Value:
    b = k.builder
    numbers = ir.VectorType(_I32, k.lanes)
    zero = ir.Constant(_I32, 0)
    count = b.trunc(n.minimum(k.lanes).value, _I32)
    counts = b.insert_element(ir.Constant(numbers, ir.Undefined), count, zero)
    counts = b.shuffle_vector(counts, counts, ir.Constant(numbers, [0] * k.lanes))
    return b.icmp_signed("<", ir.Constant(numbers, list(range(k.lanes))), counts)
