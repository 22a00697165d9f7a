"""Diffusion rewiring against dense matrices and PyG's GDC."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_geometric.data import Data
from torch_geometric.transforms import GDC

import grand_fast as gf
from grand_fast.data import rewiring
from grand_fast.testing import assert_close, random_edge_index

N = 60


def undirected(n=N, degree=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, n, (2, degree * n), generator=g)
    edges = edges[:, edges[0] != edges[1]]
    return torch.cat([edges, edges.flip(0)], dim=1).unique(dim=1)


def dense(edges, n, *, kernel, alpha=0.15, t=5.0, **_):
    """`S [N, N]`, receivers in rows."""
    a = torch.eye(n, dtype=torch.float64)
    a.index_put_((edges[1], edges[0]), torch.ones(edges.shape[1], dtype=a.dtype), True)
    root = a.sum(1).rsqrt()
    transition = root[:, None] * a * root
    eye = torch.eye(n, dtype=torch.float64)
    if kernel == "ppr":
        return alpha * torch.linalg.inv(eye - (1 - alpha) * transition)
    return torch.from_numpy(scipy.linalg.expm(t * (transition - eye).numpy()))


def matrix(edge_index, weight, n):
    a = torch.zeros(n, n, dtype=torch.float64)
    a[edge_index[1], edge_index[0]] = weight.double()
    return a


DIFFUSIONS = {
    "ppr": {"kernel": "ppr"},
    "ppr-0.5": {"kernel": "ppr", "alpha": 0.5},
    "heat": {"kernel": "heat"},
    "heat-1": {"kernel": "heat", "t": 1.0},
}
EACH = pytest.mark.parametrize("diffusion", DIFFUSIONS.values(), ids=DIFFUSIONS)
GRAPHS = {
    "undirected": (undirected(), N),
    "directed": random_edge_index("random"),
    "empty_rows": random_edge_index("empty_rows"),
    "repeated": random_edge_index("repeated"),
    "loops": random_edge_index("loops"),
    "hub": random_edge_index("hub"),
    "path": random_edge_index("path"),
    "no_edges": random_edge_index("no_edges"),
}


@EACH
@pytest.mark.parametrize("name", GRAPHS)
def test_top_k_against_dense(name, diffusion):
    edges, n = GRAPHS[name]
    edge_index, weight = gf.diffusion_rewiring(edges, n, top_k=7, tolerance=0.0, **diffusion)
    s = dense(edges, n, **diffusion)
    largest = s.topk(7, dim=1).values
    neighbours = torch.eye(n, dtype=torch.float64)
    neighbours[edges[1], edges[0]] = 1
    reached = torch.linalg.matrix_power(neighbours / neighbours.sum(), n) > 0
    possible = reached.sum(1).clamp(max=7)  # not all nodes reach so many
    receiver = edge_index[1]
    assert torch.equal(torch.bincount(receiver, minlength=n), possible)
    assert edge_index.dtype == torch.int64 and weight.dtype == torch.float32
    key = edge_index[1] * n + edge_index[0]
    assert bool((key.diff() > 0).all())  # sorted, no edge twice
    # Equal entries may go in either order: what counts are the values
    value = s[edge_index[1], edge_index[0]]
    assert_close("weights", weight, value / largest.sum(1)[receiver], tolerance=1e-6)
    sums = torch.zeros(n, dtype=torch.float64).index_add(0, receiver, value)
    assert_close("sums", sums, largest.sum(1))


@EACH
@pytest.mark.parametrize("name", ["undirected", "directed", "hub", "repeated"])
def test_threshold_against_dense(name, diffusion):
    edges, n = GRAPHS[name]
    s = dense(edges, n, **diffusion)
    threshold = float(s.flatten().quantile(0.8)) * (1 + 1e-9)
    got = gf.diffusion_rewiring(edges, n, threshold=threshold, tolerance=0.0, **diffusion)
    want = torch.where(s >= threshold, s, 0)
    total = want.sum(1, keepdim=True)
    assert_close("A", matrix(*got, n), want / torch.where(total == 0, 1, total), tolerance=1e-6)
    assert got[0].shape[1] == int((want > 0).sum())


@EACH
@pytest.mark.parametrize("rule", [{"top_k": 8}, {"threshold": 0.02}], ids=["top_k", "threshold"])
@pytest.mark.parametrize("name", ["undirected", "directed"])
def test_against_pyg(name, rule, diffusion):
    edges, n = GRAPHS[name]
    kwargs = {"method": diffusion["kernel"], "alpha": diffusion.get("alpha", 0.15)}
    if diffusion["kernel"] == "heat":
        kwargs = {"method": "heat", "t": diffusion.get("t", 5.0)}
    sparsify = {"method": "threshold", "eps": 0.02}
    if "top_k" in rule:
        sparsify = {"method": "topk", "k": 8, "dim": 0}
    ones = torch.ones(edges.shape[1], dtype=torch.float64)
    transform = GDC(1.0, "sym", "col", kwargs, sparsify, exact=True)
    data = transform(Data(edge_index=edges, edge_attr=ones, num_nodes=n))
    got = gf.diffusion_rewiring(edges, n, tolerance=0.0, **rule, **diffusion)
    want = matrix(data.edge_index, data.edge_attr, n)
    if name == "directed":  # where not all nodes reach 8, GDC keeps zeros
        assert_close("A", matrix(*got, n), want, tolerance=1e-6)
    else:
        order = (data.edge_index[1] * n + data.edge_index[0]).argsort()
        assert torch.equal(got[0], data.edge_index[:, order])
        assert_close("A", matrix(*got, n), want, tolerance=1e-6)


@EACH
@pytest.mark.parametrize("tolerance", [1e-5, 1e-4, 1e-3])
def test_what_tolerance_leaves_out(diffusion, tolerance):
    """Entries are too small, if at all, and by no more than the docstring says."""
    edges, n = undirected(400), 400
    exact = dense(edges, n, **diffusion)
    graph = gf.Graph.from_edge_index(edges, n)
    degree = (graph.rowptr.diff() + 1).double()
    from scipy.stats import geom, poisson

    is_ppr = diffusion["kernel"] == "ppr"
    length = (
        geom(diffusion.get("alpha", 0.15), loc=-1) if is_ppr else poisson(diffusion.get("t", 5))
    )
    approximate = torch.zeros(n, n, dtype=torch.float64)
    for first, row, col, value in rewiring._blocks(graph, length, tolerance, ""):
        approximate[first + row, col] = torch.from_numpy(value)
    error = exact - approximate
    lengths = int(length.isf(tolerance)) + 1  # beyond, nothing is followed from anywhere
    bound = lengths * tolerance * (degree[:, None] * degree).sqrt()
    assert float(error.min()) > -1e-12 and bool((error <= bound + 1e-12).all())
    assert float(error.max()) > 0


def test_the_largest_entries_are_found_at_the_default_tolerance():
    edges, n = undirected(200, 3), 200
    for kernel in rewiring.KERNELS:
        got = matrix(*gf.diffusion_rewiring(edges, n, kernel=kernel, top_k=16), n)
        want = matrix(*gf.diffusion_rewiring(edges, n, kernel=kernel, top_k=16, tolerance=0.0), n)
        both = (got > 0) & (want > 0)
        assert int(both.sum()) > 0.99 * 16 * n
        assert float((got / want - 1)[both].abs().max()) < 0.03


@EACH
def test_blocks_make_no_difference(diffusion, monkeypatch):
    edges, n = GRAPHS["hub"]
    want = gf.diffusion_rewiring(edges, n, top_k=9, **diffusion)
    for size in (1, 7 * n + 3):  # of one row, and of seven
        monkeypatch.setattr(rewiring, "_BLOCK", size)
        got = gf.diffusion_rewiring(edges, n, top_k=9, **diffusion)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_of_equal_entries_those_of_lower_numbers():
    star = torch.stack([torch.arange(1, 9), torch.zeros(8, dtype=torch.int64)])
    edge_index, _ = gf.diffusion_rewiring(torch.cat([star, star.flip(0)], 1), 9, top_k=4)
    assert edge_index[0, edge_index[1] == 0].tolist() == [0, 1, 2, 3]


def test_input_and_output_fit_the_rest():
    edges, n = GRAPHS["undirected"]
    want = gf.diffusion_rewiring(edges, n, top_k=5)
    for given in (edges.int(), gf.Graph.from_edge_index(edges, n).edge_index()):
        assert torch.equal(gf.diffusion_rewiring(given, n, top_k=5)[0], want[0])
    graph = gf.Graph.from_edge_index(want[0], n, want[1])
    assert_close("rows", graph.random_walk_weights(), graph.edge_weight.double())
    model = gf.nn.GRAND(4, 8, 3, variant="nl-rw", attention_threshold=0.15)
    model(torch.randn(n, 4), graph).sum().backward()
    assert gf.diffusion_rewiring(edges[:, :0], 0, top_k=5)[0].shape == (2, 0)


def test_a_threshold_may_leave_rows_without_edges():
    edges, n = GRAPHS["undirected"]
    edge_index, weight = gf.diffusion_rewiring(edges, n, threshold=10.0)
    assert edge_index.shape == (2, 0) and weight.shape == (0,)


def test_memory_does_not_grow_with_the_square_of_the_nodes(monkeypatch):
    n, block = 1_000, 1 << 14
    monkeypatch.setattr(rewiring, "_BLOCK", block)
    edges = undirected(n, 2)[:, : 2 * n]
    tracemalloc.start()
    try:
        edge_index, _ = gf.diffusion_rewiring(edges, n, top_k=8, tolerance=1e-2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert edge_index.shape[1] <= 8 * n
    # 8 bytes an entry of a block and some temporaries of its size; a dense matrix: 8 MB
    assert peak < 8 * 8 * block + 40 * 8 * n


def test_bad_input():
    edges, n = GRAPHS["undirected"]
    cases = [
        ({}, ValueError, "`top_k` or `threshold` must be given, one of them, got neither"),
        ({"top_k": 3, "threshold": 0.1}, ValueError, "one of them, got both"),
        ({"top_k": 0}, ValueError, "`top_k` must be an int of at least 1, got 0"),
        ({"top_k": 2.5}, ValueError, "`top_k` must be an int"),
        ({"top_k": 3, "kernel": "gauss"}, ValueError, "`kernel` must be one of ppr, heat"),
        ({"top_k": 3, "alpha": 1.0}, ValueError, r"`alpha` must be in \(0, 1\), got 1.0"),
        ({"top_k": 3, "alpha": None}, TypeError, "`alpha` must be a float, got NoneType"),
        ({"top_k": 3, "t": 0.0}, ValueError, "`t` must be finite and above 0, got 0.0"),
        ({"top_k": 3, "tolerance": -1e-9}, ValueError, "finite and at least 0, got -1e-09"),
        ({"threshold": 0.0}, ValueError, "`threshold` must be finite and above 0, got 0.0"),
        ({"threshold": np.nan}, ValueError, "`threshold` must be finite and above 0, got nan"),
    ]
    for options, error, text in cases:
        with pytest.raises(error, match=text) as caught:
            gf.diffusion_rewiring(edges, n, **options)
        assert str(caught.value).startswith("diffusion_rewiring: `")
    with pytest.raises(ValueError, match="must hold ids below num_nodes=3"):
        gf.diffusion_rewiring(edges, 3, top_k=3)
