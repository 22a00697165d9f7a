"""The emulator on small kernels: loops, memories, what it counts, and what it refuses."""

import pytest
import torch

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from tests.gpu.ptx import emulator
from tests.gpu.ptx.emulator import execute
from tests.gpu.ptx.parser import EmulationError, Opcode

from ._ptx import LANES, kernel, lanes, per_lane

NUMBERS = per_lane(0, 1, -1, 7, -8, 123456789)


def test_masked_load_keeps_the_register():
    code = "setp.lt.s32 %p1, %r90, 5; mov.b32 {d}, 7; @%p1 ld.global.b32 {d}, [%rd71];"
    got = lanes(code, NUMBERS, dtype=torch.int32)
    assert got.tolist() == NUMBERS[:5].tolist() + [7] * 27


def test_loop_and_statistics():
    """Programs take as many turns as their number says."""
    body = """
	mov.u32 	%r1, %ctaid.x;
	mov.b32 	%r2, 0;
	mov.b32 	%r3, 0;
	setp.ge.s32 	%p1, %r2, %r1;
	@%p1 bra 	$L__BB0_2;
$L__BB0_1:                              // the loop
	add.s32 	%r3, %r3, 10;
	add.s32 	%r2, %r2, 1;
	setp.lt.s32 	%p2, %r2, %r1;
	@%p2 bra 	$L__BB0_1;
$L__BB0_2:
	mul.wide.u32 	%rd1, %r1, 128;
	mad.wide.u32 	%rd2, %r90, 4, %rd90;
	add.s64 	%rd3, %rd2, %rd1;
	st.global.b32 	[%rd3], %r3;
	ret;"""
    y = torch.empty(100, LANES, dtype=torch.int32)
    done = execute(kernel(body), [y], (100,))
    assert torch.equal(y, (10 * torch.arange(100, dtype=torch.int32))[:, None].expand(-1, LANES))
    assert done.instructions["add.s32"] == 2 * sum(range(100))
    assert done.instructions["ret"] == done.programs == 100
    assert (done.sectors_loaded, done.sectors_stored) == (0, 100 * LANES * 4 // 32)


def test_three_axes_of_programs():
    body = """
	mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
	mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
	mad.lo.s32 %r6, %r3, %r5, %r2;
	mad.lo.s32 %r7, %r6, %r4, %r1;
	mad.wide.u32 %rd1, %r7, 4, %rd90;
	st.global.b32 [%rd1], %r7;
	ret;"""
    y = torch.empty(24, dtype=torch.int32)
    execute(kernel(body), [y], (2, 3, 4))
    assert y.tolist() == list(range(24))


@pytest.mark.parametrize(
    ("stride", "width", "sectors"), [(4, 1, 4), (0, 1, 1), (32, 1, 32), (16, 4, 16), (8, 2, 8)]
)
def test_sectors(stride, width, sectors):
    registers = ", ".join(f"%r{i}" for i in range(width))
    kind = f"v{width}.b32" if width > 1 else "b32"
    body = f"""
	mad.wide.u32 %rd1, %r90, {stride}, %rd90;
	ld.global.L1::evict_last.{kind} {{ {registers} }}, [ %rd1 + 0 ];
	ret;"""
    x = torch.zeros(LANES * 8)
    assert x.data_ptr() % 32 == 0
    assert execute(kernel(body), [x], (1,)).sectors_loaded == sectors


def _exchange(barrier, *, threads=2 * LANES, by=LANES, again=""):
    """Every thread writes its number to shared memory and reads that of another."""
    body = f"""
	mov.b32 	%r1, global_smem;
	shl.b32 	%r2, %r90, 2;
	add.s32 	%r3, %r1, %r2;
	xor.b32 	%r4, %r3, {4 * by};
	st.shared.b32 	[ %r3 + 0 ], %r90;
	{barrier}
	ld.shared.b32 	%r5, [%r4];
	{again}
	mad.wide.u32 	%rd1, %r90, 4, %rd90;
	st.global.b32 	[%rd1], %r5;
	ret;"""
    y = torch.empty(threads, dtype=torch.int32)
    done = execute(kernel(body, threads=threads), [y], (1,), shared=4 * threads)
    assert y.tolist() == [i ^ by for i in range(threads)]
    return done


WARP_BARRIER, BARRIER = "bar.warp.sync -1;", "bar.sync 0;"


def test_shared_memory():
    assert _exchange(BARRIER).barriers == 2  # of one program, in two warps
    _exchange(BARRIER, by=1)
    _exchange(WARP_BARRIER, by=1)
    _exchange(BARRIER, again=f"{BARRIER} st.shared.b32 [%r3], %r1;")


@pytest.mark.parametrize(
    ("barrier", "by", "again", "did"),
    [
        ("", LANES, "", "reads what another wrote"),
        (WARP_BARRIER, LANES, "", "reads what another wrote"),
        ("", 1, "", "reads what another wrote"),
        (BARRIER, LANES, "st.shared.b32 [%r3], %r1;", "writes what another read"),
        (BARRIER, LANES, f"{WARP_BARRIER} st.shared.b32 [%r3], %r1;", "writes what another read"),
        (BARRIER, 1, "st.shared.b32 [%r3], %r1;", "writes what another read"),
        (BARRIER, 1, f"{BARRIER} st.shared.b32 [%r1], %r90;", "writes what another writes"),
    ],
)
def test_shared_memory_races(barrier, by, again, did):
    with pytest.raises(EmulationError, match=f"race.*{did}"):
        _exchange(barrier, by=by, again=again)


def test_lanes_that_store_unlike_copies():
    """Of one warp, at once: the device lets one of them win, and does not say which."""
    with pytest.raises(EmulationError, match="race.*writes what another writes"):
        _exchange(BARRIER, threads=LANES, by=1, again=f"{BARRIER} st.shared.b32 [%r1], %r90;")


@pytest.mark.parametrize("transposed", ("", ".trans"))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_matrices(count, transposed):
    """Lane 4r + c holds elements 2c and 2c + 1 of row r."""
    registers = ", ".join(f"%r{i}" for i in range(count))
    both = f"sync.aligned.m8n8.x{count}"
    body = f"""
	shl.b32 	%r10, %r90, 4;
	and.b32 	%r11, %r10, {128 * count - 1};
	mad.wide.u32 	%rd1, %r11, 1, %rd90;
	ld.global.v4.b32 	{{%r20, %r21, %r22, %r23}}, [%rd1];
	st.shared.v4.b32 	[%r11], {{%r20, %r21, %r22, %r23}};
	bar.warp.sync 	-1;
	ldmatrix.{both}{transposed}.shared.b16 {{{registers}}}, [%r11];
	add.s32 	%r12, %r11, {128 * count};
	stmatrix.{both}.shared.b16 [%r12], {{{registers}}};
	bar.warp.sync 	-1;
	ld.shared.v4.b32 	{{%r20, %r21, %r22, %r23}}, [%r12];
	mad.wide.u32 	%rd2, %r11, 1, %rd91;
	st.global.v4.b32 	[%rd2], {{%r20, %r21, %r22, %r23}};
	ret;"""
    x = torch.arange(64 * count, dtype=torch.int16).reshape(count, 8, 8)
    y = torch.empty_like(x)
    execute(kernel(body, parameters=2), [x, y], (1,), shared=256 * count)
    assert torch.equal(y, x.mT if transposed else x)


def _refused(body, message, *, grid=(1,), size=64):
    with pytest.raises(EmulationError, match=message):
        execute(kernel(body), [torch.zeros(size, dtype=torch.int32)], grid, names=["y_ptr"])


@pytest.mark.parametrize(
    "code",
    [
        "fma.rn.f64 %rd1, %rd2, %rd3, %rd4;",
        "add.rn.bf16 %rs1, %rs2, %rs3;",
        "add.sat.s32 %r1, %r2, %r3;",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
        "atom.global.gpu.acq_rel.add.f32 %r1, [ %rd90 + 0 ], %r90;",
        "ld.local.b32 %r1, [%rd90];",
        "ld.relaxed.gpu.global.b32 %r1, [%rd90];",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;",
        "bar.sync 0, 64;",
        "trap;",
    ],
)
def test_unknown_instructions_are_named(code):
    opcode = code.split()[0].rstrip(";")
    _refused(f"{code}\nret;", f"kernel, PTX line .*instruction `{opcode}` is not emulated")


def test_divergent_branch():
    code = "setp.lt.s32 %p1, %r90, 5;\n@%p1 bra $L__BB0_1;\n$L__BB0_1:\nret;"
    _refused(code, "divergent branch: threads of program 0 part")


def test_endless_loop(monkeypatch):
    monkeypatch.setattr(emulator, "_ENDLESS", 100)
    _refused("$L__BB0_1:\nadd.s32 %r1, %r1, 1;\nbra.uni $L__BB0_1;", "a loop does not end")


def test_out_of_bounds():
    store = "st.global.b32 [%rd1 + {offset}], %r90;\nret;"
    lane = "mad.wide.u32 %rd1, %r90, 4, %rd90;\n"
    _refused(lane + store.format(offset=132), "program 0, thread 31: .*`y_ptr` \\+ 256 are out")
    _refused(lane + store.format(offset=-4), "thread 0: .*`y_ptr` - 4 are out of bounds")
    _refused("mov.b64 %rd1, 0;\nld.global.b32 %r1, [%rd1];\nret;", "out of bounds")
    _refused("mov.b32 %r1, 0;\nld.shared.b32 %r2, [%r1];\nret;", "of shared memory")


def test_misaligned():
    _refused("ld.global.v2.b32 {%r1, %r2}, [%rd90 + 4];\nret;", "8 bytes at .* are misaligned")


def test_conflicting_stores():
    _refused("st.global.b32 [%rd90], %r90;\nret;", "another thread stores another value")
    _refused(
        "mov.u32 %r1, %ctaid.x;\nst.global.b32 [%rd90], %r1;\nret;", "another value", grid=(2,)
    )
    code = "mov.b32 %r1, 7;\nst.global.b32 [%rd90], %r1;\nret;"
    execute(kernel(code), [torch.zeros(1, dtype=torch.int32)], (3,))  # the same value may be


@pytest.mark.parametrize("first", ("ld", "st"))
def test_programs_that_depend_on_each_other(first):
    """Program 0 stores element 0, program 1 loads it, whichever comes first."""
    is_loader = 1 if first == "st" else 0
    _refused(
        f"""mov.u32 %r1, %ctaid.x;
	setp.eq.s32 %p1, %r1, {is_loader};
	@%p1 ld.global.b32 %r2, [%rd90];
	@!%p1 st.global.b32 [%rd90], %r1;
	ret;""",
        "loads what another program stores",
        grid=(2,),
    )


def test_undefined_registers_are_nan():
    """The compiler packs one where it needs half a register; used, it would show."""
    code = "mov.b32 {d}, {{%rs1, %rs2}};"
    assert bool(lanes(code, NUMBERS, dtype=torch.float32).isnan().all())
    code = "setp.lt.s32 %p1, %r90, 9; @%p1 mov.b32 %r1, 0; mov.b32 {d}, %r1;"
    got = lanes(code, NUMBERS, dtype=torch.float32)
    assert bool((got[:9] == 0).all() and got[9:].isnan().all())


def test_opcode():
    assert Opcode.parse("mad.wide.s32") == ("mad", ("wide",), ("s32",))
    assert Opcode.parse("cvt.rn.bf16x2.f32") == ("cvt", ("rn",), ("bf16x2", "f32"))
    assert str(Opcode.parse("ld.global.L1::evict_last.v4.b32")) == "ld.global.L1::evict_last.v4.b32"
