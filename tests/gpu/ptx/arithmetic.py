"""What the instructions compute that touch registers alone: one table, from opcode to function.

Operands are numpy arrays, one element per lane, or one for all; a function never writes to them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.gpu.ptx.parser import EmulationError, Opcode

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]

# Type as PTX names it → numpy's. Untyped bits are unsigned, and bf16 is its bits.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2",
        "b32": "u4", "u32": "u4", "s32": "i4", "b64": "u8", "u64": "u8", "s64": "i8",
        "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2",
    }.items()
}  # fmt: skip
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


class Operation(NamedTuple):
    """A function, and the types of its operands."""

    function: Function
    sources: tuple[str, ...]


class _Rule(NamedTuple):
    """How an opcode becomes an operation, and the modifiers and types that it may carry."""

    build: Callable[[Opcode], Operation]
    modifiers: frozenset[str]
    types: frozenset[str]


def operation(opcode: Opcode) -> Operation:
    """The meaning of `opcode`; an error names it if it has none here."""
    rule = _RULES.get(opcode.name)
    if (
        rule is None
        or not opcode.types
        or not rule.modifiers.issuperset(opcode.modifiers)
        or not rule.types.issuperset(opcode.types)
    ):
        raise unknown(opcode)
    made = rule.build(opcode)
    if "ftz" in opcode.modifiers:
        made = made._replace(function=_flushing(made.function))
    return made


def unknown(opcode: Opcode) -> EmulationError:
    """What to raise for an instruction without a meaning here."""
    return EmulationError(f"instruction `{opcode}` is not emulated")


def _same(function: Function, operands: int) -> Callable[[Opcode], Operation]:
    """Operands and result of one type."""
    return lambda opcode: Operation(function, opcode.types * operands)


def _extremum(without_nan: Function, with_nan: Function) -> Callable[[Opcode], Operation]:
    """A NaN gives way to the other operand, unless the modifier `NaN` keeps it."""

    def build(opcode: Opcode) -> Operation:
        kind = opcode.types[0]
        plain = with_nan if "NaN" in opcode.modifiers else without_nan
        function = plain
        if kind == "bf16":

            def function(a: Array, b: Array) -> Array:
                return _to_bf16(plain(_from_bf16(a), _from_bf16(b)))

        return Operation(function, opcode.types * 2)

    return build


def _magnitude(opcode: Opcode) -> Operation:
    """Of bfloat16, which numpy takes for an integer, all bits but the first."""
    is_bits = opcode.types == ("bf16",)
    return Operation((lambda a: a & np.uint16(0x7FFF)) if is_bits else np.abs, opcode.types)


def _flushing(function: Function) -> Function:
    """`.ftz`: subnormal operands and results count as zero."""

    def flush(a: Array) -> Array:
        if a.dtype != np.float32:
            return a
        return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)

    return lambda *operands: flush(function(*map(flush, operands)))


def _multiply(opcode: Opcode) -> Operation:
    """`mul`: the lower half of an integer product, the upper one, or all of it."""
    (kind,) = opcode.types
    if not {"wide", "hi"}.intersection(opcode.modifiers):
        return Operation(np.multiply, (kind, kind))
    if kind not in _WIDER:
        raise unknown(opcode)
    narrow, wide = DTYPES[kind], DTYPES[_WIDER[kind]]
    bits = 8 * narrow.itemsize
    if "wide" in opcode.modifiers:
        return Operation(lambda a, b: a.astype(wide) * b, (kind, kind))
    return Operation(lambda a, b: (a.astype(wide) * b >> bits).astype(narrow), (kind, kind))


def _multiply_add(opcode: Opcode) -> Operation:
    """`mad` and `fma`. A float32 product is exact in float64, where the sum is rounded first."""
    (kind,) = opcode.types
    narrow = DTYPES[kind]
    if "wide" in opcode.modifiers:
        if kind not in _WIDER:
            raise unknown(opcode)
        wide = _WIDER[kind]
        return Operation(lambda a, b, c: a.astype(DTYPES[wide]) * b + c, (kind, kind, wide))
    if narrow.kind == "f":
        return Operation(lambda a, b, c: (a.astype(np.float64) * b + c).astype(narrow), (kind,) * 3)
    return Operation(lambda a, b, c: a * b + c, (kind,) * 3)


def _shift(opcode: Opcode) -> Operation:
    """A shift by the width or more leaves zeros, or the sign."""
    (kind,) = opcode.types
    last = 8 * DTYPES[kind].itemsize - 1

    def shift(a: Array, by: Array) -> Array:
        step = np.minimum(by, last).astype(a.dtype)
        shifted: Array = a << step if opcode.name == "shl" else a >> step
        if opcode.name == "shr" and a.dtype.kind == "i":
            return shifted
        return np.where(by > last, a.dtype.type(0), shifted)

    return Operation(shift, (kind, "u32"))


def _extract_bits(opcode: Opcode) -> Operation:
    """`bfe`: `length` bits from `start` on; a signed type extends the last one taken."""
    (kind,) = opcode.types

    def extract(a: Array, start: Array, length: Array) -> Array:
        wide = a.astype(np.int64)
        begin = np.minimum(start & 255, 32).astype(np.int64)
        end = np.minimum(begin + (length & 255), 32)
        above = np.int64(-1) << (end - begin)  # the bits beyond the field
        field: Array = (wide >> begin) & ~above
        if kind == "s32":
            negative = (wide >> np.maximum(end - 1, 0)) & 1
            field = np.where((negative == 1) & (length & 255 > 0), field | above, field)
        return field.astype(a.dtype)

    return Operation(extract, (kind, "u32", "u32"))


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """`prmt`: four bytes out of eight; the top bit of a selector asks for copies of the sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both, dtype=np.uint32)
    for position in range(4):
        pick = (selector >> np.uint32(4 * position)).astype(np.uint64)
        byte = (both >> (8 * (pick & 7))) & 255
        byte = np.where(pick & 8, 255 * (byte >> 7), byte)
        result = result | (byte << (8 * position)).astype(np.uint32)
    return result


def _select(opcode: Opcode) -> Operation:
    def select(a: Array, b: Array, choose: Array) -> Array:
        return np.where(choose, a, b)

    return Operation(select, (*opcode.types * 2, "pred"))


# A comparison with NaN is false; the forms that end in `u`, for unordered, are then true.
_COMPARISONS: dict[str, Function] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip


def _compare(opcode: Opcode) -> Operation:
    comparisons = [name for name in opcode.modifiers if name != "ftz"]
    if len(comparisons) != 1:
        raise unknown(opcode)
    return Operation(_COMPARISONS[comparisons[0]], opcode.types * 2)


def _convert(opcode: Opcode) -> Operation:
    """`cvt`; to `bf16x2` and `f16x2` two values at once, the first into the upper half."""
    if len(opcode.types) != 2:
        raise unknown(opcode)
    to, of = opcode.types
    one = _conversion(opcode, to.removesuffix("x2"), of)
    if not to.endswith("x2"):
        return Operation(one, (of,))

    def both(upper: Array, lower: Array) -> Array:
        high, low = (one(a).view(np.uint16).astype(np.uint32) for a in (upper, lower))
        return high << np.uint32(16) | low

    return Operation(both, (of, of))


def _conversion(opcode: Opcode, to: str, of: str) -> Function:
    """From one type to another: to nearest, ties to even; to an integer, toward zero."""
    if of.endswith("x2") or ("bf16" in (to, of) and "f32" not in (to, of)):
        raise unknown(opcode)
    if to == "bf16":
        return _to_bf16
    if of == "bf16":
        return _from_bf16
    to_integer = DTYPES[of].kind == "f" and DTYPES[to].kind != "f"
    if to_integer != ("rzi" in opcode.modifiers):
        raise unknown(opcode)
    if to_integer:
        return lambda a: _to_integer(a, DTYPES[to])
    return lambda a: a.astype(DTYPES[to])


def _to_integer(a: Array, to: np.dtype[Any]) -> Array:
    """What does not fit becomes the nearest integer that does, and NaN zero."""
    low, high = np.iinfo(to).min, np.iinfo(to).max
    whole = np.trunc(np.where(np.isnan(a), 0, a).astype(np.float64))
    inside = np.where((whole > low) & (whole < high), whole, 0).astype(to)
    return np.where(whole <= low, to.type(low), np.where(whole >= high, to.type(high), inside))


def _from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bf16(a: Array) -> Array:
    bits = a.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(a), np.uint16(0x7FFF), rounded)


_FLOATS = "f16 f32 f64"
_INTEGERS = "u16 s16 u32 s32 u64 s64"
_BITS = "b16 b32 b64"


def _rule(build: Callable[[Opcode], Operation], types: str, modifiers: str = "") -> _Rule:
    return _Rule(build, frozenset(modifiers.split()), frozenset(types.split()))


# `approx` and `full` promise some bits less than numpy gives: an emulated kernel is a little more
# exact than one on the device.
_RULES: dict[str, _Rule] = {
    "mov": _rule(_same(lambda a: a, 1), f"pred {_BITS} {_INTEGERS} {_FLOATS}"),
    "add": _rule(_same(np.add, 2), f"{_INTEGERS} {_FLOATS}", "rn ftz"),
    "sub": _rule(_same(np.subtract, 2), f"{_INTEGERS} {_FLOATS}", "rn ftz"),
    "mul": _rule(_multiply, f"{_INTEGERS} {_FLOATS}", "rn ftz lo hi wide"),
    "mad": _rule(_multiply_add, _INTEGERS, "lo wide"),
    "fma": _rule(_multiply_add, "f16 f32", "rn ftz"),
    "div": _rule(_same(np.divide, 2), _FLOATS, "rn full approx ftz"),
    "neg": _rule(_same(np.negative, 1), f"s16 s32 s64 {_FLOATS}", "ftz"),
    "abs": _rule(_magnitude, f"s16 s32 s64 {_FLOATS} bf16", "ftz"),
    "max": _rule(_extremum(np.fmax, np.maximum), f"{_INTEGERS} {_FLOATS} bf16", "ftz NaN"),
    "min": _rule(_extremum(np.fmin, np.minimum), f"{_INTEGERS} {_FLOATS} bf16", "ftz NaN"),
    "ex2": _rule(_same(np.exp2, 1), "f32", "approx ftz"),
    "lg2": _rule(_same(np.log2, 1), "f32", "approx ftz"),
    "rcp": _rule(_same(lambda a: 1 / a, 1), _FLOATS, "rn approx ftz"),
    "sqrt": _rule(_same(np.sqrt, 1), _FLOATS, "rn approx ftz"),
    "rsqrt": _rule(_same(lambda a: 1 / np.sqrt(a), 1), _FLOATS, "approx ftz"),
    "and": _rule(_same(np.bitwise_and, 2), f"pred {_BITS}"),
    "or": _rule(_same(np.bitwise_or, 2), f"pred {_BITS}"),
    "xor": _rule(_same(np.bitwise_xor, 2), f"pred {_BITS}"),
    "not": _rule(_same(np.invert, 1), f"pred {_BITS}"),
    "shl": _rule(_shift, _BITS),
    "shr": _rule(_shift, f"{_BITS} {_INTEGERS}"),
    "bfe": _rule(_extract_bits, "u32 s32"),
    "prmt": _rule(lambda _: Operation(_permute_bytes, ("b32",) * 3), "b32"),
    "selp": _rule(_select, f"{_BITS} {_INTEGERS} {_FLOATS}"),
    "setp": _rule(
        _compare, f"{_BITS} {_INTEGERS} {_FLOATS}", " ".join((*_COMPARISONS, "ftz"))
    ),
    "cvt": _rule(
        _convert, f"u8 s8 {_INTEGERS} {_FLOATS} bf16 bf16x2 f16x2", "rn rzi ftz"
    ),
}  # fmt: skip
