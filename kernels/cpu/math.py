"""Arithmetic on `Vec`: sums across lanes, roots and exp."""

import math
from collections.abc import Callable, Sequence

import llvmlite.ir as ir

from grand_fast.kernels.cpu.language import Vec

_LN2_HIGH = 0.693145751953125  # 15 bits of ln 2: its product with an exponent is exact
_LN2_LOW = 1.428606820309417232e-6  # the rest, to more digits than ln 2 has in float64


def fma(a: Vec, b: Vec, c: Vec) -> Vec:
    """`a · b + c`, rounded once."""
    k = a.kernel
    name = f"llvm.fma.v{k.lanes}f{k.format.bits}"
    return Vec(k, k.intrinsic(name, k.vector_type, [a.value, b.value, c.value]))


def add(a: Vec, b: Vec) -> Vec:
    """`a + b`, as a function."""
    return a + b


def maximum(a: Vec, b: Vec) -> Vec:
    """The larger of the two in each lane; `b` where either is NaN."""
    k = a.kernel
    larger = k.builder.fcmp_ordered(">", a.value, b.value)
    return Vec(k, k.builder.select(larger, a.value, b.value))


def absolute(a: Vec) -> Vec:
    """`|a|`."""
    k = a.kernel
    name = f"llvm.fabs.v{k.lanes}f{k.format.bits}"
    return Vec(k, k.intrinsic(name, k.vector_type, [a.value]))


def sqrt(x: Vec) -> Vec:
    """`√x`, rounded once."""
    k = x.kernel
    name = f"llvm.sqrt.v{k.lanes}f{k.format.bits}"
    return Vec(k, k.intrinsic(name, k.vector_type, [x.value]))


def where_positive(x: Vec, yes: Vec, no: Vec) -> Vec:
    """Lane by lane `yes` where `x > 0`, else `no`."""
    k = x.kernel
    positive = k.builder.fcmp_ordered(">", x.value, k.splat(0.0).value)
    return Vec(k, k.builder.select(positive, yes.value, no.value))


def butterfly(vec: Vec, operation: Callable[[Vec, Vec], Vec], low: int, high: int) -> Vec:
    """Combine lanes whose numbers differ in the bits `low`, 2·`low`, … below `high`."""
    bit = low
    while bit < high:
        vec = operation(vec, vec.shuffle([i ^ bit for i in range(vec.kernel.lanes)]))
        bit *= 2
    return vec


def transposed_sum(parts: Sequence[Callable[[], Vec]], lanes: int) -> Vec:
    """Lane `l` holds the sum over all lanes of vector `l · n // lanes`; n is a power of two.

    n reductions for about the price of one. The vectors come as functions, called when they are
    first needed, so that only about log n of them are alive at a time.
    """

    def combine(members: Sequence[Callable[[], Vec]], bit: int) -> Vec:
        if len(members) == 1:
            return members[0]()
        half = len(members) // 2
        # Members are halved by the top bit of their number, which becomes lane bit `bit`.
        low = combine(members[:half], bit // 2)
        high = combine(members[half:], bit // 2)
        own = [i + (lanes if i & bit else 0) for i in range(lanes)]
        partner = [i ^ bit for i in range(lanes)]
        partner = [p + (lanes if i & bit else 0) for i, p in enumerate(partner)]
        return low.shuffle(own, high) + low.shuffle(partner, high)

    return butterfly(combine(parts, lanes // 2), add, 1, lanes // len(parts))


def exp(x: Vec) -> Vec:
    """`e^x` for `x` up to about 80, to one rounding; a vanishing result may be 1e-37, not 0."""
    k, f = x.kernel, x.kernel.format
    b = k.builder
    low = k.splat(f.exp_low)
    below = b.fcmp_ordered("<", x.value, low.value)  # false for NaN, which passes through
    x = Vec(k, b.select(below, low.value, x.value))
    # Adding 1.5 · 2^mantissa rounds to an integer n and leaves it in the low bits of the sum.
    shift = k.splat(1.5 * 2.0**f.mantissa)
    shifted = fma(x, k.splat(math.log2(math.e)), shift)
    n = shifted - shift
    r = fma(n, k.splat(-_LN2_HIGH), x)
    r = fma(n, k.splat(-_LN2_LOW), r)
    p = k.splat(1.0 / math.factorial(f.exp_degree))
    for i in reversed(range(f.exp_degree)):
        p = fma(p, r, k.splat(1.0 / math.factorial(i)))
    bits = ir.VectorType(ir.IntType(f.bits), k.lanes)
    to_exponent = ir.Constant(bits, [f.mantissa] * k.lanes)
    scale = b.shl(b.bitcast(shifted.value, bits), to_exponent)
    return Vec(k, b.bitcast(b.add(b.bitcast(p.value, bits), scale), k.vector_type))
