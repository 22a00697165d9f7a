"""Seeds, the backend fixture, memory that shows when it was never written, checked shapes."""

import os
from pathlib import Path

# Read when torch is loaded. After a call its threads would spin, while others want the core: the
# other part of `make test`, and our kernels' threads. Twice the time of small tensors.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from jaxtyping import install_import_hook

# The references check the shapes of their annotations while testing; users do not pay for it.
install_import_hook(
    [
        "grand_fast.kernels.attention_diffusion.reference",
        "grand_fast.kernels.attention_product.reference",
        "grand_fast.kernels.csr_diffusion.reference",
        "grand_fast.kernels.edge_attention.reference",
        "grand_fast.kernels.edge_softmax.reference",
        "grand_fast.kernels.spmm.reference",
        "grand_fast.kernels.stage_update.reference",
    ],
    "beartype.beartype",
)

import torch  # noqa: E402

from grand_fast.kernels.cpu import memory  # noqa: E402

BACKENDS = ("reference", "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def one_thread():
    """Small tensors take longer with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_pictures(monkeypatch):
    """Half of a training of seconds: curves are drawn where a test is about them."""

    def blank(run, path, *, title):
        path.write_bytes(b"\x89PNG")

    monkeypatch.setattr("grand_fast.training.folder.draw_training_curves", blank)


@pytest.fixture
def pictures():
    """For a test whose curves are to be drawn, where others go without."""


@pytest.fixture
def nan_filled(monkeypatch):
    """`torch.empty` and its kin return NaN: an element that no kernel wrote shows."""

    def filled(make):
        def wrapper(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
    monkeypatch.setattr(memory, "_LARGE", float("inf"))  # all memory comes from torch.empty


@pytest.fixture(scope="session")
def data_root():
    """The folder of real graphs."""
    root = os.environ.get("GRAND_FAST_DATA")
    if not root:
        pytest.skip("GRAND_FAST_DATA is not set: no folder with real graphs")
    if not Path(root).is_dir():
        pytest.fail(f"GRAND_FAST_DATA={root} is not a folder")
    return Path(root)


@pytest.fixture(scope="session")
def arxiv(data_root):
    """The real ogbn-arxiv graph, symmetric, with self-loops: 2,484,941 edges."""
    import numpy as np

    import grand_fast as gf

    path = data_root / "ogbn_arxiv_graph.npz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    with np.load(path) as z:
        n = len(z["label"])
        src, dst = (torch.from_numpy(z[name].astype(np.int64)) for name in ("src", "dst"))
    nodes = torch.arange(n)
    keys = torch.cat([src * n + dst, dst * n + src, nodes * n + nodes]).unique()
    return gf.Graph.from_edge_index(torch.stack([keys % n, keys // n]), n)
