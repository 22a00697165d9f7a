"""The reader of machine code and the model, on code short enough to count by hand."""

import numpy as np
import pytest
import torch

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from bench.core.problem import Shape
from bench.gpu_report import sass
from bench.gpu_report.compile import MODELLED, Resources
from bench.gpu_report.hardware import GPUS, resident_programs
from bench.gpu_report.launches import passes
from bench.gpu_report.locality import Reuse, community_order, gathered_rows
from bench.gpu_report.metrics import label, machine_code
from bench.gpu_report.model import GATHERED, is_modelled, times, traffic
from grand_fast.testing import random_graph

SHAPE = Shape(128, 4, 128)


def _encoded(text, *, stall=1, scoreboard=7, waits=0):
    """One instruction as nvdisasm prints it, without its address."""
    word = stall << 41 | scoreboard << 46 | waits << 52
    return text, f"/* 0x{0:016x} */", f"/* 0x{word:016x} */"


def _code(*lines):
    """A disassembly of the instructions and labels."""
    text, address = [".section\t.text._kernel", "_kernel:"], 0
    for line in lines:
        if isinstance(line, str):
            text.append(f"{line}:")
        else:
            text.append(f"        /*{address:04x}*/                   {line[0]} ;  {line[1]}")
            text.append(f"                                            {line[2]}")
            address += 16
    return sass.parse("\n".join(text))


LOOP = (
    _encoded("MOV R1, c[0x0][0x28]"),
    _encoded("@P0 BRA `(.L_x_2)", stall=5),
    ".L_x_1",
    _encoded("LDG.E R4, [R2.64]", scoreboard=0),
    _encoded("LDG.E.128 R8, [R4.64]", scoreboard=1, waits=0b1),
    _encoded("@!P1 LDG.E.128 R12, [R4.64+0x200]", scoreboard=1),
    _encoded("FFMA R20, R8, R12, R20", waits=0b10, stall=4),
    _encoded("SHFL.BFLY PT, R21, R20, 0x1, 0x1f", scoreboard=2),
    _encoded("MUFU.EX2 R22, R21", waits=0b100, scoreboard=2),
    _encoded("ISETP.GE.AND P0, PT, R2, R3, PT", waits=0b100),
    _encoded("@!P0 BRA `(.L_x_1)", stall=5),
    ".L_x_2",
    _encoded("STG.E.128 [R2.64], R20"),
    _encoded("EXIT", stall=5),
    ".L_x_3",
    _encoded("BRA `(.L_x_3)", stall=0),
    _encoded("NOP", stall=0),
)


def test_parser():
    code = _code(*LOOP)
    assert len(code) == 13  # no NOP
    load = code[4]
    assert (load.opcode, load.bytes, load.is_load) == ("LDG.E.128", 16, True)
    assert (load.stall, load.scoreboard, load.waits) == (1, 1, 0)
    assert code[2].label == ".L_x_1" and code[2].bytes == 4
    assert code[0].scoreboard is None and code[0].address == 0
    assert [sass.count(code, p) for p in ("LDG", "FFMA|FMUL", "SHFL", "MUFU")] == [3, 1, 1, 1]
    widths = ("LDG.E.U8 R1, [R2]", "LDG.E.U16 R1, [R2]", "LDG.E.64 R2, [R2]", "LDG.E R1, [R2]")
    assert [i.bytes for i in _code(*map(_encoded, widths))] == [1, 2, 8, 4]


def test_loops():
    assert sass.innermost_loops(_code(*LOOP)) == [range(2, 10)]
    nested = _code(
        ".L_x_0", _encoded("IADD3 R1, R1, R2, RZ"), ".L_x_1", _encoded("FADD R1, R1, R2"),
        _encoded("@P1 BRA `(.L_x_1)"), _encoded("@P2 BRA `(.L_x_1)"), _encoded("@P0 BRA `(.L_x_0)"),
        _encoded("@P0 BRA `(.L_x_9)"), ".L_x_9", _encoded("EXIT"),
    )  # fmt: skip
    assert sass.innermost_loops(nested) == [range(1, 4)]
    by_address = _code(_encoded("NOP"), _encoded("LDG.E R1, [R1]"), _encoded("@P0 BRA 0x10"))
    assert sass.innermost_loops(by_address) == [range(0, 2)]


def test_longest_path():
    """One side of a branch, the one through the loop that counts, and that loop once."""
    code = _code(
        _encoded("S2R R1, SR_CTAID.X"), _encoded("@P0 BRA `(.L_x_2)"),  # 0, 1
        ".L_x_1", _encoded("FADD R1, R1, R2"), _encoded("@P1 BRA `(.L_x_1)"),  # 2, 3
        *[_encoded("FMUL R1, R1, R2")] * 4, _encoded("BRA `(.L_x_4)"),  # 4 … 8
        ".L_x_2", _encoded("FFMA R1, R1, R2, R3"), ".L_x_3", _encoded("LDG.E R1, [R2]"),  # 9, 10
        _encoded("@!P1 BRA `(.L_x_3)"), _encoded("BRA P3, `(.L_x_4)"),  # 11, 12
        _encoded("MUFU.EX2 R1, R1"),  # 13
        ".L_x_4", _encoded("@P2 EXIT"), _encoded("STG.E [R2], R1"), _encoded("EXIT"),  # 14 … 16
    )  # fmt: skip
    once, twice = range(2, 4), range(10, 12)
    assert sass.innermost_loops(code) == [once, twice]
    assert sass.longest_path(code, [once]) == [0, 1, *range(2, 9), 14, 15, 16]
    assert sass.longest_path(code, [twice]) == [0, 1, *range(9, 17)]
    assert sass.longest_path(_code(*LOOP), [range(2, 10)]) == list(range(12))


def test_loads_in_flight():
    body = _code(*LOOP)[2:10]
    assert sass.load_bytes(body) == 32 * (4 + 16 + 16)
    assert sass.load_bytes(body, at_least=16) == 32 * 32
    assert sass.bytes_in_flight(body) == 32 * 32  # the index has come by then
    ahead = _code(
        _encoded("LDG.E.128 R4, [R2]", scoreboard=0), _encoded("LDG.E.128 R8, [R2]", scoreboard=1),
        _encoded("FADD R1, R8, R8", waits=0b10),
    )  # fmt: skip
    # nobody waits for the first, so it is still open when the next turn asks for both again
    assert sass.bytes_in_flight(ahead) == 3 * 512


def test_cycles():
    two_rounds = _code(*LOOP)[2:10]
    short = sass.cycles(two_rounds, 0.0, turns=3)
    # index, then rows: two latencies one after the other
    assert sass.cycles(two_rounds, 500.0, turns=3) == pytest.approx(short + 2 * 500, abs=4)
    assert sass.cycles(_code(_encoded("FADD R1, R1, R1", stall=4)) * 3, 500.0) == 12


def test_occupancy():
    def programs(registers, shared=0, warps=1):
        used = Resources(registers, 0, shared, warps, wide_loads=0, barriers=0, float_atomics=0)
        return resident_programs(used, GPUS["sm_80"])

    assert programs(64) == 32  # as many programs as a multiprocessor holds
    assert programs(72) == 28 and programs(128) == 16 and programs(255) == 8
    assert programs(64, warps=4) == 8 and programs(32, warps=4) == 16
    assert programs(32, shared=40 * 1024) == 4


@pytest.mark.parametrize("capacity", [0, 1, 3, 10, 20, 50])
def test_misses_of_an_lru_cache(capacity):
    rng = np.random.default_rng(0)
    rows = (rng.random(500) ** 2 * 20).astype(np.int32)
    cache, missed = [], 0  # the latest last
    for row in rows:
        missed += row not in cache
        cache = [r for r in cache if r != row] + [row]
        cache = cache[-capacity:] if capacity else []
    reuse = Reuse(rows, 20)
    assert reuse.misses(capacity) == missed
    assert reuse.miss_share(capacity) == missed / 500


def test_rows_in_either_order():
    graph = random_graph("hub", 40)
    launch = passes(graph, SHAPE, torch.float32)["attention_diffusion forward"][-2]
    assert label(launch) == "attention_diffusion_fwd (scaled, one_sweep)"
    rows = gathered_rows(launch)
    hub = int(graph.rowptr.diff().argmax())
    begin, end = graph.rowptr[hub].item(), graph.rowptr[hub + 1].item()
    assert np.array_equal(rows[: end - begin], graph.col[begin:end].numpy())
    position = community_order(graph)
    assert sorted(position) == list(range(40))
    other = gathered_rows(launch, position)
    assert np.array_equal(np.sort(rows), np.sort(other))
    assert np.array_equal(rows[: end - begin], other[: end - begin])  # hubs first in both
    assert not np.array_equal(rows, other)


def test_traffic_is_that_of_the_docstrings():
    graph = random_graph("random", 50)
    n, e = graph.num_nodes, graph.num_edges
    by_pass = passes(graph, SHAPE, torch.float32)
    moved = traffic(by_pass["attention_diffusion forward"][0])
    # col, the pieces, q, f, norm, alpha; k and x are gathered
    assert moved.streamed == 4 * e + 12 * n + 4 * n * (128 + 128 + 2 * 4) + 4 * 128
    assert moved.gathered == moved.gathered_once == moved.gathered_l2 == 4 * (128 + 128)
    moved = traffic(by_pass["csr_diffusion backward"][0])
    assert moved.gathered == 4 * 128
    assert moved.gathered_l2 == 4 * 128 + 32  # a, through its slots


@pytest.mark.slow
@pytest.mark.parametrize("arch", MODELLED)
def test_every_gather_kernel_is_modelled(arch):
    """A kernel with other loops than `GATHERED` says would drop out of the report."""
    graph = random_graph("hub", 17)
    seen = set()
    for launches in passes(graph, SHAPE, torch.float32).values():
        for launch in launches:
            gathers = "col_ptr" in launch.arguments and not launch.name.endswith("_join_kernel")
            gathers = gathers and not launch.name.startswith("_edge_softmax")  # edges in order
            if launch.name not in seen and gathers:
                kernel = machine_code(launch, arch)
                message = f"{launch.name}: {len(kernel.loops)} gather loops; see model.GATHERED"
                assert is_modelled(kernel), message
                modelled = times(kernel, Reuse(gathered_rows(launch), graph.num_nodes))
                assert modelled.seconds >= modelled.floor > 0
            seen.add(launch.name)
    assert set(GATHERED) <= seen
