"""Which projections the fused operator keeps for backward: by their size and the free memory."""

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from grand_fast.ops import projected_attention_diffusion
from grand_fast.ops.backends import free_memory
from grand_fast.ops.calls import recompute
from grand_fast.testing import random_graph

MIB = 1 << 20
# The function of that name hides the module in its package.
OWN = vars(sys.modules["grand_fast.ops._projected_attention"])


def of_bytes(size, dtype=torch.float32):
    """A tensor that says so, and takes none."""
    return torch.empty(1, dtype=dtype).expand(1, size // dtype.itemsize)


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory of the machine, in bytes."""

    def set_to(available):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    return set_to


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rule(free, dtype):
    kept, x = OWN["_is_kept"], of_bytes(MIB)
    free(0)
    assert kept(of_bytes(16 * MIB, dtype), x)
    assert not kept(of_bytes(16 * MIB + 8, dtype), x)
    free(32 * 64 * MIB)  # up to a thirty-second part of it
    assert kept(of_bytes(64 * MIB - 8, dtype), x)
    assert not kept(of_bytes(64 * MIB, dtype), x)


def test_free_memory_of_a_gpu_counts_what_torch_holds_of_it(monkeypatch):
    gpu = torch.device("cuda")
    for name, value in (("mem_get_info", (1000, 10**12)), ("memory_reserved", 500),
                        ("memory_allocated", 200)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(gpu) == 1300


def test_a_recompute_block_keeps_a_share_of_the_state(free):
    kept, x = OWN["_is_kept"], of_bytes(8 * MIB)
    free(10**15)
    with recompute():
        assert not kept(of_bytes(8), x)
    with recompute(0.25):
        assert kept(of_bytes(2 * MIB), x)
        assert not kept(of_bytes(2 * MIB + 8), x)
    assert kept(of_bytes(10**9), x)


def saved_bytes(graph, x, weight):
    """Of the storages that autograd keeps, but for what is given."""
    given = {x.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}
    sizes = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        projected_attention_diffusion(x, weight, torch.zeros(len(weight)), graph, heads=2)
    return sum(sizes.values())


def test_the_operator_goes_by_it(free, monkeypatch):
    graph = random_graph("random")
    n, d_att = graph.num_nodes, 64
    x, weight = torch.randn(n, 4), torch.randn(2 * d_att, 4, requires_grad=True)
    size = n * 2 * d_att * 4  # bytes of q and k
    free(0)
    always = saved_bytes(graph, x, weight)
    monkeypatch.setitem(OWN, "_ALWAYS_KEPT", 0)
    never = saved_bytes(graph, x, weight)
    free(32 * size + 32)
    plenty = saved_bytes(graph, x, weight)
    assert always == plenty and size * 0.9 < always - never <= size
