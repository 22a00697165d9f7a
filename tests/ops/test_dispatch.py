"""Which backend runs, and the one sentence that says why another cannot."""

import logging

import pytest
import torch

import grand_fast as gf
from grand_fast.ops import backends

GPU = torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A GPU that is not there; its attributes can be set before the first question."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("GRAND_FAST_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "_triton_version", lambda: "3.7.1")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    backends.unsupported_reasons.cache_clear()
    yield monkeypatch
    backends.unsupported_reasons.cache_clear()


def sentence(device=GPU, dtype=torch.float32):
    return backends.cannot_run("gpu", device, dtype)


def test_a_gpu_that_fits(machine):
    assert sentence() is None


def test_no_gpu(machine):
    machine.setattr(torch.cuda, "is_available", lambda: False)
    want = "backend 'gpu' cannot run: torch sees no GPU. 'auto' uses 'cpu' here."
    assert sentence(torch.device("cpu")) == want


def test_tensors_of_the_processor(machine):
    assert "must be on a CUDA device, got 'cpu'. 'auto' uses 'cpu'" in sentence(torch.device("cpu"))


def test_old_gpu(machine):
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    machine.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert sentence() == (
        "backend 'gpu' cannot run: the GPU must be of compute capability 8.0 or newer, got 7.5 "
        "(Tesla T4). 'auto' uses 'reference' here."
    )


def test_amd_counts_otherwise(machine):
    machine.setattr(torch.version, "hip", "6.4")
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (0, 0))
    assert sentence() is None


def test_triton_is_missing(machine):
    machine.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed (pip install triton). 'auto' uses 'reference'" in sentence()


@pytest.mark.parametrize("version", ["3.6.0", "3.8.1", "3.70.0", "of unknown version"])
def test_triton_of_an_untested_version(machine, version):
    machine.setattr(backends, "_triton_version", lambda: version)
    assert f"triton {version} is untested (pip install 'triton==3.7.*'). 'auto'" in sentence()


def test_the_installed_triton_is_the_tested_one():
    pytest.importorskip("triton")
    assert backends._triton_version().startswith(f"{backends.TESTED_TRITON}.")


def test_all_reasons_are_given(machine):
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr(backends, "_triton_version", lambda: "3.5.0")
    got = sentence(dtype=torch.float64)
    for part in ("triton 3.5.0 is untested", "torch sees no GPU", "got float64"):
        assert part in got


def test_an_operator_raises_it(machine):
    machine.setattr(torch.cuda, "is_available", lambda: False)
    graph = gf.Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises(RuntimeError) as error:
        gf.ops.csr_diffusion(torch.ones(2, 3), torch.ones(2), graph, backend="gpu")
    assert str(error.value) == f"csr_diffusion: {sentence(torch.device('cpu'))}"


def test_auto_falls_back_and_says_so_once(machine, caplog):
    machine.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    backends._warn_once.cache_clear()
    x = torch.empty(0, device="meta")

    class OnGpu:  # what `choose` looks at
        device, dtype, is_cuda = GPU, x.dtype, True

    with caplog.at_level(logging.WARNING, logger="grand_fast"):
        for _ in range(2):
            assert backends.choose("csr_diffusion", "auto", OnGpu()) == "reference"
    assert len(caplog.records) == 1
    assert "falls back from 'gpu' to the reference: the GPU must be of" in caplog.text
