"""The GPU kernels in Triton's interpreter, through the public operators, against float64.

It shows masks, offsets, empty rows, split rows and the algebra; `_memory.py` checks every access.
It says nothing about races inside a program, compilation (`test_compile.py`) or speed.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import grad

from ._mode import INTERPRETED, skip_module

if not INTERPRETED:
    skip_module(__file__)

from grand_fast import Graph
from grand_fast.kernels.edge_attention import reference
from grand_fast.kernels.edge_attention.gpu import edge_attention_fwd
from grand_fast.kernels.gpu import pieces
from grand_fast.ops import (
    attention_diffusion,
    attention_product,
    csr_diffusion,
    edge_attention,
    edge_softmax,
    error_ratio,
    projected_attention_diffusion,
    spmm,
    stage_update,
)
from grand_fast.testing import assert_close, random_edge_index
from tests._pairwise import pairwise

from ._memory import checked_memory

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")

PIECE_EDGES = 8  # rows of a small graph then have several pieces
KINDS = ("random", "no_edges", "empty", "empty_rows", "hub", "loops", "repeated", "single")
SIZES = ((5, 3, 7), (16, 4, 8), (1, 1, 1), (33, 2, 3), (3, 16, 2))  # d, H, d_k
CASES = [(kind, SIZES[i % len(SIZES)]) for i, kind in enumerate(KINDS)] + [
    ("hub", SIZES[0]), ("empty_rows", SIZES[1]), ("random", SIZES[4]), ("repeated", SIZES[3]),
]  # fmt: skip
IDS = [f"{kind}-d{d}-H{h}-dk{d_k}" for kind, (d, h, d_k) in CASES]
HALF = (torch.bfloat16, torch.float16)
OPERATORS = ("csr_diffusion", "edge_attention", "edge_attention_mean", "attention_diffusion")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch, nan_filled):
    monkeypatch.setattr(pieces, "plan", functools.partial(pieces.plan, piece_edges=PIECE_EDGES))


def _graph(kind, n=12):
    edge_index, n = random_edge_index(kind, {"empty_rows": 18, "repeated": 6}.get(kind, n))
    if kind == "hub":  # node 1 then receives from, and node 2 sends to, a good 20 edges more
        edge_index = edge_index[:, :110]
    return Graph.from_edge_index(edge_index, n)


def _inputs(operator, graph, d, h, d_k, dtype=torch.float32):
    n = graph.num_nodes
    shapes = {"x": (n, d), "alpha": (d,), "beta": (d,), "x0": (n, d)}
    if operator == "csr_diffusion":
        shapes["a"] = (graph.num_edges,)
    else:
        shapes |= {"q": (n, h, d_k), "k": (n, h, d_k)}
    if operator.startswith("edge_attention"):
        shapes = {name: shapes[name] for name in ("q", "k")}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def _run(operator, graph, inputs, backend, dtype=None, needs=None):
    """The output, and the gradients of a fixed linear function of it, by name."""
    leaves = {
        name: value.detach().to(dtype or value.dtype).requires_grad_(needs is None or name in needs)
        for name, value in inputs.items()
    }
    if operator == "csr_diffusion":
        out = csr_diffusion(graph=graph, backend=backend, **leaves)
    elif operator == "attention_diffusion":
        out = attention_diffusion(graph=graph, backend=backend, **leaves)
    elif operator.startswith("attention_product"):
        reduce = operator.rpartition("_")[2]
        out = attention_product(graph=graph, reduce=reduce, backend=backend, **leaves)
    else:
        mean = operator == "edge_attention_mean"
        out = edge_attention(graph=graph, mean_heads=mean, backend=backend, **leaves)
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = grad(out, list(wanted.values()), weights.to(inputs_dtype(inputs)).to(out.dtype))
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}


def inputs_dtype(inputs):
    return next(iter(inputs.values())).dtype


def _compare(operator, graph, inputs, needs=None):
    with checked_memory():
        got = _run(operator, graph, inputs, "gpu", needs=needs)
    want = _run(operator, graph, inputs, "reference", torch.float64, needs=needs)
    for name in want:
        assert_close(name, got[name], want[name])


# By turns one weight a head, and their mean
EACH = [
    pytest.param(operator, *case, id=f"{operator}-{name}")
    for i, (case, name) in enumerate(zip(CASES, IDS, strict=True))
    for operator in (
        "csr_diffusion",
        OPERATORS[1 + (i + i // len(KINDS)) % 2],
        "attention_diffusion",
    )
]


@pytest.mark.parametrize(("operator", "kind", "sizes"), EACH)
def test_against_float64(operator, kind, sizes):
    graph = _graph(kind)
    _compare(operator, graph, _inputs(operator, graph, *sizes))


KEY, VALUE = "edge_key", "edge_value"


@pytest.mark.parametrize(
    ("kind", "sizes", "reduce", "tables", "dtype", "needs"),
    [
        ("hub", SIZES[0], "mean", (KEY, VALUE), torch.float32, None),
        ("empty_rows", SIZES[1], "cat", (VALUE,), torch.bfloat16, None),
        ("single", SIZES[3], "mean", (KEY,), torch.float32, {"q", KEY}),
        ("empty_rows", SIZES[4], "cat", (KEY, VALUE), torch.float32, {"values", VALUE}),
        ("no_edges", SIZES[2], "mean", (KEY,), torch.float32, None),
        ("empty", SIZES[1], "mean", (VALUE,), torch.float32, None),
    ],
    ids=str,
)
def test_attention_product(kind, sizes, reduce, tables, dtype, needs):
    graph, (d, h, d_k) = _graph(kind), sizes
    n, e = graph.num_nodes, graph.num_edges
    shapes = {"values": (n, h, d), "q": (n, h, d_k), "k": (n, h, d_k)}
    shapes |= {name: (e, h, d_k if name == KEY else d) for name in tables}
    inputs = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    _compare(f"attention_product_{reduce}", graph, inputs, needs)


@pytest.mark.parametrize(
    ("kind", "heads", "rest", "dtype"),
    [
        ("hub", None, (), torch.float32),
        ("empty_rows", None, (3, 5), torch.float32),
        ("hub", 3, (5,), torch.float32),
        ("hub", 3, (3, 5), torch.float32),
        ("repeated", 2, (16,), torch.bfloat16),
        ("hub", 4, (4, 6), torch.float16),
        ("no_edges", 2, (3,), torch.float32),
        ("empty", 2, (2, 3), torch.float32),
    ],
    ids=str,
)
def test_spmm(kind, heads, rest, dtype):
    graph = _graph(kind)
    e, n = graph.num_edges, graph.num_nodes
    given = [torch.randn(e) if heads is None else torch.randn(e, heads), torch.randn(n, *rest)]
    results = []
    for backend, wide in (("gpu", dtype), ("reference", torch.float64)):
        leaves = [t.to(dtype).to(wide).requires_grad_() for t in given]
        with checked_memory():
            y = spmm(graph, *leaves, backend=backend)
            upstream = torch.cos(torch.arange(y.numel())).reshape(y.shape).to(dtype)
            results.append([y, *grad(y, leaves, upstream.to(wide))])
    for name, got, want in zip(("y", "dvalues", "dx"), *results, strict=True):
        assert_close(name, got, want)


@pytest.mark.parametrize(
    ("kind", "heads", "normalizer", "normalize", "dtype"),
    [
        ("hub", 3, "softmax", "receiver", torch.float32),
        ("hub", None, "squareplus", "receiver", torch.float32),
        ("empty_rows", 5, "softmax", "sender", torch.float32),
        ("hub", 2, "squareplus", "sender", torch.float32),
        ("no_edges", 2, "squareplus", "receiver", torch.float32),
        ("empty", 2, "softmax", "sender", torch.float32),
        ("repeated", 4, "softmax", "receiver", torch.bfloat16),
    ],
    ids=str,
)
def test_edge_softmax(kind, heads, normalizer, normalize, dtype):
    graph = _graph(kind)
    e = graph.num_edges
    given = (2 * torch.randn(e) if heads is None else 2 * torch.randn(e, heads)).to(dtype)
    results = []
    for backend, wide in (("gpu", dtype), ("reference", torch.float64)):
        scores = given.to(wide).requires_grad_()
        options = {"normalizer": normalizer, "normalize": normalize, "backend": backend}
        with checked_memory():
            a = edge_softmax(scores, graph, **options)
            upstream = torch.cos(torch.arange(a.numel())).reshape(a.shape).to(dtype)
            results.append([a, *grad(a, scores, upstream.to(wide))])
    for name, got, want in zip(("a", "dscores"), *results, strict=True):
        assert_close(name, got, want)


@pairwise(
    call={"csr": csr_diffusion, "attention": attention_diffusion},
    needs_alpha=(False, True),
    scale_of_x=(0.0, 2.0),
)
def test_added_tensors(call, needs_alpha, scale_of_x):
    """As many tensors as a solver of order five adds; one is columns of a wider table."""
    graph = _graph("hub")
    n = graph.num_nodes
    inputs = _inputs(call.__name__, graph, 5, 2, 3)
    inputs |= {f"y{s}": torch.randn(n, 5) for s in range(4)} | {"y4": torch.randn(n, 9)[:, 2:7]}
    results = []
    for backend, dtype in (("gpu", torch.float32), ("reference", torch.float64)):
        leaves = {
            name: value.detach().to(dtype).requires_grad_(name != "alpha" or needs_alpha)
            for name, value in inputs.items()
        }
        x, ys = leaves["x"], [leaves.pop(f"y{s}") for s in range(5)]
        add = [(scale_of_x, x), *((s - 1.5, y) for s, y in enumerate(ys))]
        f = call(graph=graph, backend=backend, add=add, **leaves)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        results.append([f, *grad(f.square().sum(), [*ys, *wanted.values()])])
    names = ["f", *(f"dy{s}" for s in range(5)), *wanted]
    for name, got, want in zip(names, *results, strict=True):
        assert_close(name, got, want)


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [*zip(OPERATORS, 2 * HALF, strict=True), ("attention_diffusion", HALF[0])],
    ids=str,
)
def test_half_types_are_no_worse_than_pytorch(operator, dtype):
    graph = _graph("hub")
    inputs = _inputs(operator, graph, 5, 2, 4, dtype)
    with checked_memory():
        got = _run(operator, graph, inputs, "gpu")
    plain = _run(operator, graph, inputs, "reference")
    want = _run(operator, graph, inputs, "reference", torch.float64)
    rounding = torch.finfo(dtype).eps / 2
    for name in want:
        scale = float(want[name].abs().max())
        error = float((plain[name].double() - want[name]).abs().max()) / scale
        assert got[name].dtype == dtype
        assert_close(name, got[name], want[name], tolerance=2 * error + rounding)


@pytest.mark.parametrize(
    ("operator", "needs"),
    [
        ("csr_diffusion", {"x"}),
        ("csr_diffusion", {"a"}),
        ("csr_diffusion", {"alpha"}),
        ("csr_diffusion", {"beta", "x0"}),
        ("edge_attention", {"k"}),
        ("attention_diffusion", {"x"}),
        ("attention_diffusion", {"q"}),
        ("attention_diffusion", {"alpha"}),
        ("attention_diffusion", {"x", "k"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(sorted(value)),
)
def test_single_gradients(operator, needs):
    graph = _graph("random", n=8)
    _compare(operator, graph, _inputs(operator, graph, 5, 2, 3), needs)


@pytest.mark.parametrize("operator", OPERATORS)
def test_strided_rows_and_long_indices(operator):
    """q and k as two halves of one projection, x as columns of a wider table; int64 indices."""
    graph = _graph("hub", n=8)
    names = ("rowptr", "col", "rowptr_t", "col_t", "perm", "perm_t")
    graph = replace(graph, **{name: getattr(graph, name).long() for name in names})
    n, (d, h, d_k) = graph.num_nodes, (5, 2, 3)
    inputs = _inputs(operator, graph, d, h, d_k)
    if "q" in inputs:
        inputs["q"], inputs["k"] = torch.randn(n, 2, h, d_k).unbind(1)
    if "x" in inputs:
        inputs["x"], inputs["x0"] = torch.randn(n, 2 * d).chunk(2, 1)
    want = _run(operator, graph, inputs, "reference", torch.float64)
    # detach() and to() of the same dtype keep the strides
    got = _run(operator, graph, inputs, "gpu")
    for name in want:
        assert_close(name, got[name], want[name])


@pytest.mark.parametrize("operator", ("csr_diffusion", "attention_diffusion"))
def test_wide_rows_without_source(operator):
    """More columns than one warp holds, and no source term."""
    graph = _graph("random", n=5)
    inputs = _inputs(operator, graph, 600, 1, 2)
    del inputs["beta"], inputs["x0"]
    _compare(operator, graph, inputs)


def test_pieces_of_the_real_length(monkeypatch):
    monkeypatch.setattr(pieces, "plan", functools.partial(pieces.plan, piece_edges=256))
    edge_index, n = random_edge_index("hub", 8)
    assert int(torch.bincount(edge_index[1]).max()) > 256
    graph = Graph.from_edge_index(edge_index, n)
    _compare("attention_diffusion", graph, _inputs("attention_diffusion", graph, 4, 2, 2))


@pytest.mark.parametrize("kind", ("hub", "empty_rows", "no_edges"))
def test_norm(kind):
    graph = _graph(kind)
    inputs = _inputs("edge_attention", graph, 1, 3, 5)
    q, k = 3 * inputs["q"], 3 * inputs["k"]
    _, got = edge_attention_fwd(q, k, mean_heads=False, csr=graph.csr(pieces.plan))
    _, want = reference.edge_attention_fwd(
        q.double(), k.double(), mean_heads=False, csr=graph.csr()
    )
    assert_close("norm", got, want)
    shift, inverse = got[graph.rowptr.diff() == 0].unbind(1)
    assert bool((shift == -math.inf).all()) and bool((inverse == math.inf).all())


def test_large_scores():
    """exp(s) alone would overflow from s = 89 on."""
    graph = _graph("hub")
    inputs = _inputs("edge_attention", graph, 1, 2, 4)
    inputs = {"q": 30 * inputs["q"], "k": 30 * inputs["k"]}
    got = _run("edge_attention", graph, inputs, "gpu")["out"]
    want = _run("edge_attention", graph, inputs, "reference", torch.float64)["out"]
    # float32 rounds a score of some 5000 by 2⁻¹², and exp passes that on as a relative error
    assert_close("a", got, want, tolerance=3e-3)


@pytest.mark.parametrize("degrees", ([], [0], [9, 0, 8, 1, 17, 0], [0, 0], [300]), ids=str)
def test_cut(degrees):
    rowptr = torch.tensor([0, *degrees]).cumsum(0).to(torch.int32)
    work = pieces.cut(rowptr, piece_edges=PIECE_EDGES)
    rows = work.piece_row.tolist()
    split = {row for row in rows if rows.count(row) > 1}
    assert set(rows) == set(range(len(degrees)))
    assert set(rows[: work.n_split]) == split == set(work.split_row.tolist())
    slots = [
        (row, slot)
        for row, beg, end in zip(
            rows, work.piece_beg.tolist(), work.piece_end.tolist(), strict=True
        )
        for slot in range(beg, end)
    ]
    assert len(slots) == sum(degrees)
    assert all(rowptr[row] <= slot < rowptr[row + 1] for row, slot in slots)
    assert int((work.piece_end - work.piece_beg).amax()) <= PIECE_EDGES if degrees else True
    for s, row in enumerate(work.split_row.tolist()):
        first, last = work.split_ptr[s : s + 2].tolist()
        assert rows[first:last] == [row] * (last - first)
        begs = work.piece_beg[first:last].tolist()
        assert begs == sorted(begs)


@pytest.mark.parametrize(
    ("d", "heads", "d_att", "kind"),
    ((8, 1, 8, "hub"), (6, 1, 4, "empty_rows"), (33, 1, 20, "hub"), (6, 2, 4, "empty_rows"),
     (6, 2, 4, "hub")),
)  # fmt: skip
def test_projected(kind, d, heads, d_att):
    """With one head the keys' projection is absorbed: their bias then shows in norm alone."""
    graph = _graph(kind)
    shapes = {"x": (graph.num_nodes, d), "weight": (2 * d_att, d), "bias": (2 * d_att,)}
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    results = []
    for backend, dtype in (("gpu", torch.float32), ("reference", torch.float64)):
        leaves = {n: v.to(dtype).requires_grad_() for n, v in given.items()}
        f = projected_attention_diffusion(**leaves, graph=graph, heads=heads, backend=backend)
        results.append([f, *grad(f.square().sum(), list(leaves.values()))])
    for name, got, want in zip(("f", *(f"d{n}" for n in given)), *results, strict=True):
        # scores of a few tens here, whose rounding exp passes on
        assert_close(name, got, want, tolerance=2e-5)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("shape", ((), (0, 3), (5, 7), (2, 512), (3, 1025)), ids=str)
def test_stage_update(shape, dtype):
    """Less than a program takes, as much, and more than two."""
    scales = (1.0, -0.5, 2.0, 0.1, 3.0)
    given = [torch.randn(shape).to(dtype) for _ in scales]
    results = []
    for backend, kind in (("gpu", dtype), ("reference", torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in given]
        with checked_memory():
            y = stage_update(list(zip(scales, leaves, strict=True)), backend=backend)
            results.append([y, *grad(y, leaves, torch.full_like(y, 0.75))])
    assert results[0][0].dtype == dtype
    for got, want in zip(*results, strict=True):
        assert_close("y or a gradient", got, want)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("shape", ((), (5, 7), (17, 1025)), ids=str)
def test_error_ratio(shape, dtype):
    """Less than a block, less than a program's blocks, and more."""
    x, y, *slopes = (torch.randn(shape).to(dtype) for _ in range(5))
    terms = list(zip((0.5, -1.0, 0.25), slopes, strict=True))
    tolerances = {"rtol": 1e-2, "atol": 1e-3}
    with checked_memory():
        got = error_ratio(terms, x, y, **tolerances, backend="gpu")
    wide = [(c, f.double()) for c, f in terms]
    want = error_ratio(wide, x.double(), y.double(), **tolerances, backend="reference")
    assert_close("ratio", got, want)
    assert torch.equal(got, error_ratio(terms, x, y, **tolerances, backend="gpu"))


@pytest.mark.parametrize("operator", ("csr_diffusion", "attention_diffusion"))
def test_a_nan_reaches_only_its_receivers(operator):
    """Lanes past the end of a row point at node 0: they must not read it."""
    graph = _graph("random")
    inputs = _inputs(operator, graph, 5, 2, 3)
    inputs["x"][0] = math.nan
    got = _run(operator, graph, inputs, "gpu")["out"]
    want = _run(operator, graph, inputs, "reference", torch.float64)["out"]
    assert 0 < int(want.isnan().any(1).sum()) < graph.num_nodes
    assert torch.equal(got.isnan(), want.isnan())
