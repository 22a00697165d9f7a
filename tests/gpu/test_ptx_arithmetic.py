"""The emulator's instructions one at a time, against PyTorch and Python."""

import math

import pytest
import torch

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from ._ptx import LANES, lanes, per_lane

A = per_lane(0, 1, -1, 7, -8, 123456789, -123456789, 2**31 - 1, -(2**31), 0x5A5A5A5A)
B = per_lane(3, -3, 1, 2**30, 5, 77, 13)
LONG = A.long() * 1_000_003
X = per_lane(
    0.0,
    -0.0,
    1.5,
    -2.25,
    1e-3,
    3e38,
    1e-40,
    math.inf,
    -math.inf,
    math.nan,
    7.0,
    dtype=torch.float32,
)
Y = per_lane(1.0, math.nan, -2.25, 0.5, math.inf, 3.0, -1e-40, dtype=torch.float32)
U32 = 2**32


def _wrapped(values, bits=32):
    """Integers modulo 2 ** bits, as signed numbers."""
    top = 1 << (bits - 1)
    kind = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    return torch.tensor([(v + top) % (2 * top) - top for v in values], dtype=kind)


def _each(function, *inputs, bits=32):
    return _wrapped([function(*v) for v in zip(*(t.tolist() for t in inputs), strict=True)], bits)


def _field(a, start, length, signed):
    """`bfe` by its definition, bit by bit."""
    bits = a % U32
    end = min(start + length - 1, 31)
    sign = (bits >> end) & 1 if signed and length else 0
    taken = [
        (bits >> (start + i)) & 1 if i < length and start + i <= 31 else sign for i in range(32)
    ]
    return sum(bit << i for i, bit in enumerate(taken))


INTEGERS = [
    ("add.s32 {d}, {a}, {b};", (A, B), lambda a, b: a + b, 32),
    ("sub.s32 {d}, {a}, -5;", (A,), lambda a: a + 5, 32),
    ("mul.lo.s32 {d}, {a}, {b};", (A, B), lambda a, b: a * b, 32),
    ("mul.hi.s32 {d}, {a}, {b};", (A, B), lambda a, b: a * b >> 32, 32),
    ("mul.hi.u32 {d}, {a}, {b};", (A, B), lambda a, b: (a % U32) * (b % U32) >> 32, 32),
    ("mad.lo.s32 {d}, {a}, {b}, {a};", (A, B), lambda a, b: a * b + a, 32),
    ("mul.wide.s32 {d}, {a}, {b};", (A, B), lambda a, b: a * b, 64),
    ("mul.wide.u32 {d}, {a}, {b};", (A, B), lambda a, b: (a % U32) * (b % U32), 64),
    ("mad.wide.s32 {d}, {a}, -12, {c};", (A, B, LONG), lambda a, b, c: a * -12 + c, 64),
    ("mad.wide.u32 {d}, {a}, 16, {c};", (A, B, LONG), lambda a, b, c: a % U32 * 16 + c, 64),
    ("and.b32 {d}, {a}, 0xFF;", (A,), lambda a: a & 255, 32),
    ("or.b32 {d}, {a}, {b};", (A, B), lambda a, b: a | b, 32),
    ("xor.b32 {d}, {a}, {b};", (A, B), lambda a, b: a ^ b, 32),
    ("not.b32 {d}, {a};", (A,), lambda a: ~a, 32),
    ("neg.s32 {d}, {a};", (A,), lambda a: -a, 32),
    ("max.s32 {d}, {a}, {b};", (A, B), max, 32),
    ("min.u32 {d}, {a}, {b};", (A, B), lambda a, b: min(a % U32, b % U32), 32),
    ("shl.b32 {d}, {a}, 5;", (A,), lambda a: a << 5, 32),
    ("shl.b32 {d}, {a}, 32;", (A,), lambda a: 0, 32),
    ("shr.u32 {d}, {a}, 4;", (A,), lambda a: a % U32 >> 4, 32),
    ("shr.s32 {d}, {a}, 4;", (A,), lambda a: a >> 4, 32),
    ("shr.s32 {d}, {a}, 99;", (A,), lambda a: -(a < 0), 32),
    ("shl.b64 {d}, {a}, 7;", (LONG,), lambda a: a << 7, 64),
    ("bfe.u32 {d}, {a}, 4, 3;", (A,), lambda a: _field(a, 4, 3, False), 32),
    ("bfe.s32 {d}, {a}, 4, 3;", (A,), lambda a: _field(a, 4, 3, True), 32),
    ("bfe.s32 {d}, {a}, 0, 1;", (A,), lambda a: _field(a, 0, 1, True), 32),
    ("bfe.s32 {d}, {a}, 28, 9;", (A,), lambda a: _field(a, 28, 9, True), 32),
    ("bfe.s32 {d}, {a}, 3, 0;", (A,), lambda a: 0, 32),
    ("bfe.u32 {d}, {a}, 40, 4;", (A,), lambda a: 0, 32),
    ("cvt.s64.s32 {d}, {a};", (A,), lambda a: a, 64),
    ("cvt.u64.u32 {d}, {a};", (A,), lambda a: a % U32, 64),
    ("cvt.u32.u64 {d}, {a};", (LONG,), lambda a: a, 32),
    ("cvt.u16.u32 {d}, {a};", (A,), lambda a: a, 16),
    ("cvt.s32.s16 {d}, {a};", (per_lane(1, -1, 300, -300, dtype=torch.int16),), lambda a: a, 32),
    ("cvt.u32.u16 {d}, {a};", (per_lane(1, -1, dtype=torch.int16),), lambda a: a % 2**16, 32),
    ("prmt.b32 {d}, {a}, {b}, 0x7610;", (A, B), lambda a, b: (a % 2**16) | (b >> 16 << 16), 32),
    ("prmt.b32 {d}, {a}, 0, 0x8888;", (A,), lambda a: -((a >> 7) & 1), 32),
    ("mov.b64 {d}, {{{a}, {b}}};", (A, B), lambda a, b: a % U32 | b << 32, 64),
    ("mov.b32 {{%rs1, _}}, {a}; cvt.s32.s16 {d}, %rs1;", (A,),
     lambda a: (a + 2**15) % 2**16 - 2**15, 32),
    ("setp.lt.s32 %p1, {a}, {b}; selp.b32 {d}, {a}, {b}, %p1;", (A, B), min, 32),
    ("setp.lo.u32 %p1, {a}, {b}; selp.b32 {d}, 1, 0, %p1;", (A, B),
     lambda a, b: a % U32 < b % U32, 32),
    ("setp.ne.b32 %p1, {a}, 7; not.pred %p2, %p1; mov.b32 {d}, 4; @!%p2 mov.b32 {d}, 5;", (A,),
     lambda a: 4 + (a != 7), 32),
    ("mov.pred %p1, -1; mov.pred %p2, 0; and.pred %p3, %p1, %p2; selp.b32 {d}, 1, 2, %p3;", (A,),
     lambda a: 2, 32),
    ("mov.u32 {d}, %ntid.x; mov.u32 %r2, %laneid; add.s32 {d}, {d}, %r2; sub.s32 {d}, {d}, %r90;",
     (A,), lambda a: LANES, 32),
    ("mov.b32 {d}, global_smem;", (A,), lambda a: 0, 32),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "inputs", "function", "bits"), INTEGERS, ids=[c[0] for c in INTEGERS]
)
def test_integers(code, inputs, function, bits):
    want = _each(function, *inputs, bits=bits)
    assert torch.equal(lanes(code, *inputs, dtype=want.dtype), want)


FLOATS = [
    ("add.f32 {d}, {a}, {b};", torch.add),
    ("sub.f32 {d}, {a}, {b};", torch.sub),
    ("mul.f32 {d}, {a}, {b};", torch.mul),
    ("div.full.f32 {d}, {a}, {b};", torch.div),
    ("max.f32 {d}, {a}, {b};", torch.fmax),
    ("min.f32 {d}, {a}, {b};", torch.fmin),
    ("max.NaN.f32 {d}, {a}, {b};", torch.maximum),
    ("min.NaN.f32 {d}, {a}, {b};", torch.minimum),
    ("fma.rn.f32 {d}, {a}, {b}, {b};", lambda a, b: (a.double() * b + b).float()),
    ("neg.f32 {d}, {a};", lambda a, b: -a),
    ("abs.f32 {d}, {a};", lambda a, b: a.abs()),
    ("ex2.approx.f32 {d}, {a};", lambda a, b: a.exp2()),
    ("lg2.approx.f32 {d}, {a};", lambda a, b: a.log2()),
    ("rcp.approx.f32 {d}, {a};", lambda a, b: 1 / a),
    ("sqrt.rn.f32 {d}, {a};", lambda a, b: a.sqrt()),
    ("rsqrt.approx.f32 {d}, {a};", lambda a, b: a.rsqrt()),
    ("mul.f32 {d}, {a}, 0f3FB8AA3B;", lambda a, b: a * torch.tensor(1.44269502162933349609)),
    ("add.rn.ftz.f32 {d}, {a}, {b};", lambda a, b: _flush(_flush(a) + _flush(b))),
    ("fma.rn.ftz.f32 {d}, {a}, 0f3F800000, 0f00000000;", lambda a, b: _flush(a)),
]


def _flush(a):
    return torch.where(a.abs() < torch.finfo(torch.float32).tiny, 0 * a, a)


@pytest.mark.parametrize(("code", "function"), FLOATS, ids=[c[0] for c in FLOATS])
def testfloats(code, function):
    got, want = lanes(code, X, Y, dtype=torch.float32), function(X, Y)
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("max.bf16 {d}, {a}, {b};", torch.fmax),
        ("min.bf16 {d}, {a}, {b};", torch.fmin),
        ("abs.bf16 {d}, {a};", lambda a, b: a.abs()),
    ],
    ids=["max", "min", "abs"],
)
def test_bfloat16(code, function):
    a, b = X.bfloat16(), Y.bfloat16()
    got, want = lanes(code, a, b, dtype=torch.bfloat16), function(a.float(), b.float())
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ("lt", "le", "gt", "ge", "eq", "ne", "ltu", "neu", "equ", "nan"))
def test_comparisons_with_nan(name):
    """Ordered ones are false, those that end in `u` true, where either side is NaN."""
    code = f"setp.{name}.f32 %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;"
    got = lanes(code, X, Y, dtype=torch.int32).bool()
    unordered = X.isnan() | Y.isnan()
    if name == "nan":
        want = unordered
    else:
        plain = getattr(torch, name.removesuffix("u"))(X, Y)
        want = plain | unordered if name.endswith("u") else plain & ~unordered
    assert torch.equal(got, want)


HALF = per_lane(
    1.0,
    1.00390625,
    1.01171875,
    -3.3e38,
    65504.0,
    65520.0,
    1e-7,
    math.inf,
    -math.inf,
    math.nan,
    0.1,
    dtype=torch.float32,
)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types(dtype):
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    want = HALF.to(dtype)
    got = lanes(f"cvt.rn.{name}.f32 {{d}}, {{a}};", HALF, dtype=dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    back = lanes(f"cvt.f32.{name} {{d}}, {{a}};", want, dtype=torch.float32)
    torch.testing.assert_close(back, want.float(), rtol=0, atol=0, equal_nan=True)
    pair = lanes(f"cvt.rn.{name}x2.f32 {{d}}, {{a}}, 0f3F800000;", HALF, dtype=torch.int32)
    torch.testing.assert_close(pair.view(dtype)[1::2], want, rtol=0, atol=0, equal_nan=True)
    assert bool((pair.view(dtype)[::2] == 1).all())


def test_float_to_integer_and_back():
    values = per_lane(
        0.0, 1.9, -1.9, 3e9, -3e9, math.nan, math.inf, 2147483520.0, dtype=torch.float32
    )
    got = lanes("cvt.rzi.s32.f32 {d}, {a};", values, dtype=torch.int32)
    want = per_lane(0, 1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1, 2147483520)
    assert torch.equal(got, want)
    got = lanes("cvt.rn.f32.s32 {d}, {a};", A, dtype=torch.float32)
    assert torch.equal(got, A.float())


SHUFFLES = [
    ("bfly", 1, 31, lambda i: i ^ 1),
    ("bfly", 16, 31, lambda i: i ^ 16),
    ("idx", 5, 31, lambda i: 5),
    ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
    ("down", 3, 31, lambda i: i + 3 if i < 29 else i),
    ("idx", 2, 0x181F, lambda i: i // 8 * 8 + 2),  # segments of 8 lanes
    ("down", 1, 0x181F, lambda i: i + 1 if i % 8 < 7 else i),
    ("up", 1, 0x1800, lambda i: i - 1 if i % 8 else i),
]


@pytest.mark.parametrize(("mode", "by", "bounds", "source"), SHUFFLES)
def test_shuffles(mode, by, bounds, source):
    code = f"shfl.sync.{mode}.b32 {{d}}|%p1, {{a}}, {by}, {bounds}, -1;"
    values = torch.arange(LANES, dtype=torch.int32) * 3
    got = lanes(code, values, dtype=torch.int32)
    assert got.tolist() == [3 * source(i) for i in range(LANES)]
