"""The vector language of the CPU kernels, one small kernel per operation, and their sharing out."""

import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch

from grand_fast.kernels.cpu import machine_code
from grand_fast.kernels.cpu import rows as cpu_rows
from grand_fast.kernels.cpu.language import REGISTER_BYTES, Kernel, chunks
from grand_fast.kernels.cpu.machine_code import compile_kernel
from grand_fast.kernels.cpu.math import add, butterfly, exp, transposed_sum
from grand_fast.kernels.csr import Csr
from grand_fast.testing import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def lanes_of(dtype: torch.dtype) -> int:
    return REGISTER_BYTES // torch.empty(0, dtype=dtype).element_size()


def in_order(rowptr: torch.Tensor) -> cpu_rows.Work:
    """The work of a graph whose rows are visited by number."""
    return cpu_rows.plan(Csr(rowptr, torch.empty(0), None, None), lambda: None).work


def run(kernel: Kernel, **values: torch.Tensor | int) -> None:
    """Run a kernel that has no tasks on this thread."""
    function = compile_kernel(kernel.name, kernel.source())

    def argument(value: torch.Tensor | int, kind: str) -> int:
        if isinstance(value, int):
            return value
        return value.data_ptr() if kind == "address" else value.stride(0)

    arguments = [argument(values[name], kind) for name, kind in kernel.arguments]
    function((ctypes.c_int64 * len(arguments))(*arguments), 0)


@DTYPES
def test_loads_and_stores_touch_nothing_beyond_their_lanes(dtype):
    for n in range(1, lanes_of(dtype) + 1):
        k = Kernel("copy", dtype, torch.int32)
        k.vector("y").store(k.vector("x").load(n) + k.splat(1.0), n)
        k.vector("z").store_first(k.vector("x").load_first(k.number("n")), k.number("n"))
        x = torch.randn(n, dtype=dtype)
        y, z = torch.full((2, 64), math.nan, dtype=dtype)
        run(k, x=x, y=y, z=z, n=n)
        assert torch.equal(y[:n], x + 1)
        assert torch.equal(z[:n], x)
        assert y[n:].isnan().all()
        assert z[n:].isnan().all()


@DTYPES
def test_transposed_sum_adds_up_each_vector(dtype):
    for n in (1, 2, 4, 8, 16)[: lanes_of(dtype).bit_length()]:
        values = torch.randn(n, lanes_of(dtype), dtype=dtype)
        want = values.double().sum(1).repeat_interleave(lanes_of(dtype) // n)
        assert_close(f"transposed sum of {n}", sum_of_rows(values), want)


def sum_of_rows(values: torch.Tensor) -> torch.Tensor:
    k = Kernel("transposed_sum", values.dtype, torch.int32)
    x = k.matrix("x")
    rows = [lambda i=i: x.row(k.integer(i)).load() for i in range(values.shape[0])]
    k.vector("y").store(transposed_sum(rows, k.lanes))
    y = torch.empty(k.lanes, dtype=values.dtype)
    run(k, x=values, y=y)
    return y


@DTYPES
def test_butterfly_combines_lanes_of_equal_remainder(dtype):
    lanes = lanes_of(dtype)
    k = Kernel("butterfly", dtype, torch.int32)
    k.vector("y").store(butterfly(k.vector("x").load(), add, 2, lanes))
    x, y = torch.arange(lanes, dtype=dtype), torch.empty(lanes, dtype=dtype)
    run(k, x=x, y=y)
    want = x.view(-1, 2).sum(0).repeat(lanes // 2)
    assert torch.equal(y, want)


@DTYPES
def test_load_into_places_a_narrow_row(dtype):
    lanes = lanes_of(dtype)
    for start, count in ((0, 1), (4, 4), (2, 3), (lanes - 2, 2), (1, 2)):
        k = Kernel("load_into", dtype, torch.int32)
        k.vector("y").store(k.vector("x").load_into(k.splat(-1.0), start, count))
        x, y = torch.randn(count, dtype=dtype), torch.empty(lanes, dtype=dtype)
        run(k, x=x, y=y)
        want = torch.full((lanes,), -1.0, dtype=dtype)
        want[start : start + count] = x
        assert torch.equal(y, want)


def apply(function, values: torch.Tensor) -> torch.Tensor:
    """`function` of a Vec on every element; their number is a multiple of the lanes."""
    k = Kernel(function.__name__, values.dtype, torch.int32)
    x, y = k.matrix("x"), k.matrix("y")
    with k.loop(0, k.number("n")) as i:
        y.row(i).store(function(x.row(i).load()))
    x_rows = values.view(-1, k.lanes)
    result = torch.empty_like(x_rows)
    run(k, x=x_rows, y=result, n=x_rows.shape[0])
    return result.flatten()


@DTYPES
def test_exp_to_a_few_roundings(dtype):
    eps = torch.finfo(dtype).eps
    x = torch.linspace(-80, 20, 1 << 12, dtype=dtype)
    assert float((apply(exp, x).double() / x.double().exp() - 1).abs().max()) < 2 * eps


@DTYPES
def test_exp_of_extremes(dtype):
    x = torch.tensor([-math.inf, -1e30, 0.0, math.nan], dtype=dtype).repeat(lanes_of(dtype))
    got = apply(exp, x)[:4]
    assert 0 <= float(got[0]) < 1e-36
    assert 0 <= float(got[1]) < 1e-36
    assert float(got[2]) == 1.0
    assert got[3].isnan()


def test_chunks_cover_the_row():
    assert [(c.start, c.lanes) for c in chunks(37, 16, 100)] == [(100, 16), (116, 16), (132, 5)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_task_runs_once(threads):
    k = Kernel("count", torch.float32, torch.int64)
    count = k.matrix("count")
    with cpu_rows.each_row(k, pieces=False) as row:
        place = count.row(row.out)
        place.store(place.load(1) + k.splat(1.0), 1)
    rowptr = torch.arange(50_001) * 7
    count = torch.zeros(50_000, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cpu_rows.Compiled(k)(in_order(rowptr), pieces=False, count=count, rowptr=rowptr)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(count, torch.ones_like(count))


def test_plan_cuts_hubs_into_even_pieces_and_covers_every_row():
    degree = torch.tensor([3, 0, 3 * cpu_rows.CUT_FROM + 1, 5, cpu_rows.CUT_FROM])
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), degree.cumsum(0)])
    work = in_order(rowptr)
    assert work.bounds[0] == 0
    assert work.bounds[-1] == 5
    assert bool((work.bounds.diff() >= 0).all())
    assert work.longest == cpu_rows.CUT_FROM
    assert work.hub_rows.tolist() == [2]
    lengths = work.piece_end - work.piece_begin
    assert int(lengths.sum()) == int(degree[2])
    assert int(lengths.max()) <= cpu_rows.CUT_FROM
    assert int(lengths.max() - lengths.min()) <= 1
    assert work.piece_begin[0] == rowptr[2]
    assert torch.equal(work.piece_begin[1:], work.piece_end[:-1])


def test_a_row_that_is_short_beside_the_graph_is_not_cut_and_comes_first():
    degree = torch.ones(800_000, dtype=torch.int64)
    degree[500_000] = cpu_rows.CUT_FROM + 1000
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), degree.cumsum(0)])
    work = in_order(rowptr)
    assert work.hub_rows.numel() == 0
    assert work.longest == cpu_rows.CUT_FROM + 1000
    first = int(work.turn[0])
    assert work.bounds[first] <= 500_000 < work.bounds[first + 1]
    assert torch.equal(work.turn.sort().values, torch.arange(work.bounds.numel() - 1))
    assert torch.equal(work.turn[1:], work.turn[1:].sort().values)


def test_plan_of_no_rows_has_one_empty_part():
    work = in_order(torch.zeros(1, dtype=torch.int32))
    assert work.bounds.tolist() == [0, 0]
    assert work.longest == 0


def test_code_that_another_process_compiled_is_used(tmp_path, monkeypatch):
    program = (
        "import torch, grand_fast.kernels.cpu.machine_code as c\n"
        "from grand_fast.kernels.cpu.language import Kernel\n"
        "k = Kernel('empty', torch.float32, torch.int32)\n"
        "c.compile_kernel(k.name, k.source())\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-c", program], check=True)
    monkeypatch.setattr(machine_code, "_compile", None)
    k = Kernel("empty", torch.float32, torch.int32)
    compile_kernel(k.name, k.source())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes():
    rowptr = torch.arange(20_001)
    k = Kernel("rows", torch.float32, torch.int64)
    with cpu_rows.each_row(k, pieces=False) as row:
        k.matrix("y").row(row.out).store(k.splat(1.0), 1)
    kernel, work = cpu_rows.Compiled(k), in_order(rowptr)
    kernel(work, pieces=False, y=torch.empty(20_000, 1), rowptr=rowptr)
    child = os.fork()
    if child == 0:
        y = torch.zeros(20_000, 1)
        kernel(work, pieces=False, y=y, rowptr=rowptr)
        # NumPy: torch's own parallel sum could hang in a child.
        os._exit(0 if y.numpy().sum() == 20_000 else 1)
    assert os.waitpid(child, 0)[1] == 0
