"""Memory for large results: reused when free, never while a tensor still needs it."""

import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from grand_fast.kernels.cpu import memory

SHAPE = (1 << 20, 3)  # 12 MiB of float32


@pytest.fixture(autouse=True)
def _no_idle_memory():
    if not memory._has_huge_pages:
        pytest.skip("the system has no huge pages to ask for: torch allocates")
    memory._idle.clear()
    yield
    memory._idle.clear()


def test_freed_memory_is_used_again():
    first = memory.empty(*SHAPE, dtype=torch.float32)
    address = first.data_ptr()
    assert first.shape == SHAPE and first.is_contiguous()
    del first
    again = memory.empty(SHAPE[0] * 3, dtype=torch.float32)
    assert again.data_ptr() == address


def test_memory_in_use_is_not_handed_out():
    whole = memory.empty(*SHAPE, dtype=torch.float32)
    part = whole.fill_(7.0)[5:]
    storage = whole.untyped_storage()
    del whole
    other = memory.empty(*SHAPE, dtype=torch.float32).fill_(1.0)
    assert other.data_ptr() != storage.data_ptr()
    del storage
    assert bool((part == 7.0).all()) and len(memory._idle) == 0
    del part, other
    assert len(memory._idle) == 2


def test_idle_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(memory, "_idle_limit", lambda: 30 << 20)
    tensors = [memory.empty(*SHAPE, dtype=torch.float32) for _ in range(5)]
    latest = tensors[-1].data_ptr()
    while tensors:
        del tensors[0]
    assert len(memory._idle) == 2
    assert memory.empty(*SHAPE, dtype=torch.float32).data_ptr() == latest


def test_results_survive_in_other_threads_and_garbage_cycles():
    results = []

    def work(value):
        for _ in range(20):
            t = memory.empty(*SHAPE, dtype=torch.float32).fill_(value)
            cycle = [t]
            cycle.append(cycle)
            results.append(bool((t == value).all()))

    threads = [threading.Thread(target=work, args=(float(v),)) for v in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert all(results) and len(results) == 60


def test_small_and_empty_results():
    assert memory.empty(0, 5, dtype=torch.float64).shape == (0, 5)
    assert memory.empty(3, 5, dtype=torch.float64).dtype == torch.float64
    assert len(memory._idle) == 0


def test_autograd_adds_to_results_in_place():
    results = [memory.empty(*SHAPE, dtype=torch.float32).fill_(v) for v in (1.0, 2.0)]
    addresses = {t.data_ptr() for t in results}

    class Give(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.new_zeros(())

        @staticmethod
        def backward(ctx, grad):
            return results.pop()

    x = torch.zeros(SHAPE, requires_grad=True)
    shared, found = x.exp(), []
    shared.register_hook(lambda g: found.append((g.data_ptr(), float(g[0, 0]))))
    (Give.apply(shared) + Give.apply(shared)).backward()
    ((address, value),) = found
    assert value == 3.0 and address in addresses


def test_pages_of_a_result_are_filled_but_for_the_last():
    t = memory.empty(5 << 17, dtype=torch.float32)  # 2.5 MiB: half of a second huge page
    del t
    assert [len(pages) for pages in memory._idle] == [5 << 19]


@pytest.mark.parametrize("names", [
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
     "total_inactive_file"),
], ids=["v2", "v1"])  # fmt: skip
def test_free_memory_of_a_container_is_what_it_has_not_used(names, tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=1000)
    )
    assert memory.free_memory(tmp_path) == 1000
    limit, use, stat, kind = names
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    for name, text in ((limit, "800"), (use, "500"), (stat, f"anon 3\n{kind} 100\nslab 7")):
        (tmp_path / name).write_text(text + "\n")
    assert memory.free_memory(tmp_path) == 800 - (500 - 100)
    (tmp_path / limit).write_text("5000\n")
    assert memory.free_memory(tmp_path) == 1000
    (tmp_path / limit).write_text("max\n")
    assert memory.free_memory(tmp_path) == 1000
