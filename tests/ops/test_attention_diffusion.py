import math
import sys
from functools import partial

import pytest
import torch
import torch.utils.checkpoint

import grand_fast as gf
from grand_fast.ops import (
    attention_diffusion,
    csr_diffusion,
    edge_attention,
    projected_attention_diffusion,
)
from grand_fast.ops.checks import inner_contiguous
from grand_fast.testing import GRAPH_KINDS, assert_close, random_edge_index, random_graph
from tests.ops._problems import compare, compare_added, compare_one_gradient, normal

pytestmark = pytest.mark.usefixtures("nan_filled")

# d, H, d_k: one of each, odd and prime, wider than a vector register, a hub's worth of heads
SHAPES = [(1, 1, 1), (3, 1, 4), (7, 3, 5), (16, 4, 8), (33, 2, 16), (64, 8, 16), (162, 2, 16),
          (130, 1, 64), (20, 16, 3), (20, 20, 2)]  # fmt: skip
SHAPE_IDS = ["d{}-H{}-k{}".format(*s) for s in SHAPES]


def problem(n, d, heads, d_k, *, scale=1.0):
    inputs = {
        "x": normal(n, d, seed=1),
        "q": normal(n, heads, d_k, seed=2, scale=scale),
        "k": normal(n, heads, d_k, seed=3, scale=scale),
        "alpha": normal(d, seed=4),
        "beta": normal(d, seed=5),
        "x0": normal(n, d, seed=6),
    }
    return inputs


def run(graph):
    def call(x, q, k, alpha, beta, x0, backend):
        return attention_diffusion(x, q, k, graph, alpha=alpha, beta=beta, x0=x0, backend=backend)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_forward_and_backward(shape, dtype):
    graph = random_graph("hub")
    compare(run(graph), problem(graph.num_nodes, *shape), backend="cpu", dtype=dtype)


@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_graphs(kind):
    graph = random_graph(kind)
    compare(run(graph), problem(graph.num_nodes, 5, 3, 2), backend="cpu", dtype=torch.float32)


def test_rows_without_edges_get_source_and_decay(backend):
    graph = random_graph("empty_rows")
    bare = graph.rowptr.diff() == 0
    assert bare[0] and bare[-1] and bare[5:8].all()
    p = problem(graph.num_nodes, 5, 2, 3)
    f = run(graph)(**p, backend=backend)
    assert_close("f", f[bare], (-p["alpha"] * p["x"] + p["beta"] * p["x0"])[bare])


@pytest.mark.parametrize("scale", [0.0, 9.0], ids=["equal", "sharp"])
def test_extreme_scores(scale):
    graph = random_graph("hub")
    # q·k up to about ±1000: one sender takes all
    inputs = problem(graph.num_nodes, 6, 2, 12, scale=scale)
    # Scores of a thousand carry a rounding of 6e-5 in float32, and the weights inherit it.
    compare(run(graph), inputs, backend="cpu", dtype=torch.float32, tolerance=5e-4)
    compare(run(graph), inputs, backend="cpu", dtype=torch.float64, tolerance=1e-11)


def test_scalar_scales_and_no_source(backend):
    graph = random_graph("random")
    p = problem(graph.num_nodes, 4, 2, 3)
    x, q, k = p["x"], p["q"], p["k"]
    plain = attention_diffusion(x, q, k, graph, backend=backend)
    scaled = attention_diffusion(x, q, k, graph, alpha=0.3, backend=backend)
    assert_close("alpha", scaled, 0.3 * plain)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    f = attention_diffusion(x, q, k, graph, alpha=alpha, backend=backend)
    (dalpha,) = torch.autograd.grad(f.sum(), alpha)
    assert_close("dalpha", dalpha, plain.sum())


def test_int64_indices():
    graph = random_graph("hub")
    wide = gf.Graph(**{
        name: getattr(graph, name).long()
        for name in ("rowptr", "col", "rowptr_t", "col_t", "perm", "perm_t")
    })  # fmt: skip
    compare(run(wide), problem(graph.num_nodes, 5, 2, 3), backend="cpu", dtype=torch.float32)


def test_non_contiguous_input(backend):
    graph = random_graph("random")
    p = problem(graph.num_nodes, 6, 2, 4)
    want = run(graph)(**p, backend="reference")
    qk = torch.stack([p["q"], p["k"]], dim=1)  # [N, 2, H, d_k]: rows apart, as one product gives
    views = {
        **p,
        "x": torch.cat([p["x"], p["x"]], dim=1)[:, :6],
        "q": qk[:, 0],
        "k": qk[:, 1],
        "x0": p["x0"].t().contiguous().t(),  # columns apart
    }
    assert not any(views[name].is_contiguous() for name in ("x", "q", "k", "x0"))
    assert_close("f", run(graph)(**views, backend=backend), want)
    x = views["x"].clone().requires_grad_()
    f = run(graph)(**{**views, "x": x}, backend=backend)
    (dx,) = torch.autograd.grad(f.sum(), x)  # the gradient of a sum has stride 0
    x2 = p["x"].clone().requires_grad_()
    (want_dx,) = torch.autograd.grad(run(graph)(**{**p, "x": x2}, backend="reference").sum(), x2)
    assert_close("dx", dx, want_dx)


def test_halves_that_begin_in_the_middle_of_a_word_are_copied():
    """Where a row can be read in pairs; else the view itself goes to the kernels."""
    flat = torch.arange(41).bfloat16()
    odd = flat[1:].view(5, 8)
    copied = inner_contiguous(odd)
    assert copied.data_ptr() % 4 == 0 and torch.equal(copied, odd)
    for view in (flat[2:40], flat[1:40], flat[:40].float()[1:33]):
        rows = view.view(-1, 8) if len(view) % 8 == 0 else view.view(-1, 1)
        assert inner_contiguous(rows) is rows


def test_gradcheck(backend):
    graph = random_graph("empty_rows", 8)
    inputs = tuple(t.requires_grad_() for t in problem(8, 3, 2, 2).values())

    def call(x, q, k, alpha, beta, x0):
        return attention_diffusion(x, q, k, graph, alpha=alpha, beta=beta, x0=x0, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("needed", ["x", "q", "k", "alpha", "beta", "x0"])
def test_one_gradient_alone(backend, needed):
    graph = random_graph("random")
    compare_one_gradient(run(graph), problem(graph.num_nodes, 4, 2, 3), needed, backend)


def test_rows_sum_to_one_so_constants_rest(backend):
    graph = random_graph("loops")  # every node has an edge
    p = problem(graph.num_nodes, 5, 3, 4)
    constant = torch.ones(graph.num_nodes, 5, dtype=torch.float64) * p["x"][:1]
    f = attention_diffusion(constant, p["q"], p["k"], graph, backend=backend)
    assert_close("f", f, torch.zeros_like(f), tolerance=1e-14)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_maximum_principle(backend, tau):
    graph = random_graph("loops")
    p = problem(graph.num_nodes, 5, 3, 4)
    x = p["x"].float()
    f = attention_diffusion(x, p["q"].float(), p["k"].float(), graph, backend=backend)
    y = x + tau * f
    slack = 1e-6
    assert (y.amax(0) <= x.amax(0) + slack).all()
    assert (y.amin(0) >= x.amin(0) - slack).all()


def test_renumbering_permutes_the_output(backend):
    edges, n = random_edge_index("hub")
    p = problem(n, 5, 3, 4)
    order = torch.randperm(n)
    rank = torch.argsort(order)
    graph = gf.Graph.from_edge_index(edges, n)
    renumbered = gf.Graph.from_edge_index(rank[edges], n)
    moved = {k: t[order] if t.dim() > 1 else t for k, t in p.items()}
    want = run(graph)(**p, backend=backend)
    assert_close("f", run(renumbered)(**moved, backend=backend), want[order])


def test_bitwise_repeatable_for_any_thread_count():
    graph = random_graph("hub", 200)
    p = {k: t.float() for k, t in problem(graph.num_nodes, 33, 4, 8).items()}
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaves = {k: t.clone().requires_grad_() for k, t in p.items()}
            f = run(graph)(**leaves, backend="cpu")
            runs.append([f, *torch.autograd.grad(f.square().sum(), list(leaves.values()))])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_is_edge_attention_then_csr_diffusion(backend):
    graph = random_graph("hub")
    p = problem(graph.num_nodes, 5, 3, 4)
    a = edge_attention(p["q"], p["k"], graph, mean_heads=True, backend=backend)
    want = csr_diffusion(p["x"], a, graph, alpha=p["alpha"], backend=backend)
    got = attention_diffusion(p["x"], p["q"], p["k"], graph, alpha=p["alpha"], backend=backend)
    assert_close("f", got, want)


def test_saves_nothing_of_edge_size():
    graph = random_graph("hub", 60)
    p = problem(graph.num_nodes, 4, 2, 3)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(graph)(**{k: t.requires_grad_() for k, t in p.items()}, backend="cpu")
    largest = max(t.numel() for t in saved)
    assert largest <= max(t.numel() for t in p.values())
    assert largest < graph.num_edges


@pytest.mark.parametrize("kind", ["hub", "empty_rows", "empty"])
def test_added_tensors(kind):
    graph = random_graph(kind)
    compare_added(partial(attention_diffusion, graph=graph), problem(graph.num_nodes, 5, 3, 2))


@pytest.mark.slow
def test_arxiv(arxiv):
    compare(run(arxiv), problem(arxiv.num_nodes, 8, 2, 4), backend="cpu", dtype=torch.float32)


# The function of that name hides the module in its package.
PROJECTED = sys.modules["grand_fast.ops._projected_attention"]


def projection(n, d, heads, d_k):
    p = problem(n, d, heads, d_k)
    scale = d**-0.5
    weight = normal(2 * heads * d_k, d, seed=7, scale=scale)
    inputs = {"x": p["x"], "weight": weight, "bias": normal(2 * heads * d_k, seed=8)}
    return inputs | {key: p[key] for key in ("alpha", "beta", "x0")} | {"y": normal(n, d, seed=9)}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["hub", "empty_rows", "empty"])
def test_projected(kind, kept, monkeypatch):
    monkeypatch.setattr(PROJECTED, "_is_kept", lambda *given: kept)
    graph = random_graph(kind)

    def call(x, weight, bias, alpha, beta, x0, y, backend):
        return projected_attention_diffusion(
            x, weight, bias, graph, heads=3, alpha=alpha, beta=beta, x0=x0,
            add=[(0.5, x), (-2.0, y)], backend=backend,
        )  # fmt: skip

    inputs = projection(graph.num_nodes, 7, 3, 5)
    for dtype in (torch.float32, torch.float64):
        compare(call, inputs, backend="cpu", dtype=dtype)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    qk = torch.nn.functional.linear(leaves["x"], leaves["weight"], leaves["bias"])
    q, k = qk.view(graph.num_nodes, 2, 3, 5).unbind(1)
    want = run(graph)(leaves["x"], q, k, *(leaves[n] for n in ("alpha", "beta", "x0")), "reference")
    want = want + 0.5 * leaves["x"] - 2.0 * leaves["y"]
    assert_close("f", call(**leaves, backend="reference"), want)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
def test_projected_backward_twice(kept, monkeypatch):
    """The first backward may use the memory of q and k; a retained graph must not notice."""
    monkeypatch.setattr(PROJECTED, "_is_kept", lambda *given: kept)
    graph = random_graph("hub")
    inputs = projection(graph.num_nodes, 7, 3, 5)
    x, weight, bias = leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "bias")]
    f = projected_attention_diffusion(x, weight, bias, graph, heads=3, backend="cpu")
    first = torch.autograd.grad(f, leaves, torch.ones_like(f), retain_graph=True)
    second = torch.autograd.grad(f, leaves, torch.ones_like(f))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("first", [True, False], ids=["kept first", "recomputed first"])
def test_projected_under_checkpoint_when_memory_runs_short(first, monkeypatch):
    """The recomputation may find more or less free memory than the forward did."""
    answers = iter([first, not first])
    monkeypatch.setattr(PROJECTED, "_is_kept", lambda *given: next(answers, first))
    graph = random_graph("hub")
    inputs = projection(graph.num_nodes, 7, 3, 5)
    leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "bias")]

    def call(x, weight, bias):
        return projected_attention_diffusion(x, weight, bias, graph, heads=3, backend="cpu")

    f = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    got = torch.autograd.grad(f, leaves, torch.ones_like(f))
    f = call(*leaves)
    want = torch.autograd.grad(f, leaves, torch.ones_like(f))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_projected_bad_input():
    graph = random_graph("random")
    p = projection(graph.num_nodes, 4, 2, 3)
    x, weight, bias = p["x"], p["weight"], p["bias"]
    with pytest.raises(ValueError, match="projected_attention_diffusion: `heads` must divide"):
        projected_attention_diffusion(x, weight, bias, graph, heads=5)
    with pytest.raises(ValueError, match="`bias` must have shape"):
        projected_attention_diffusion(x, weight, bias[1:], graph, heads=2)
    with pytest.raises(
        ValueError, match=r"projected_attention_diffusion: `weight` .* 'gat', got d_k = 3"
    ):
        projected_attention_diffusion(x, weight, bias, graph, heads=2, score="gat")
    with pytest.raises(ValueError, match="projected_attention_diffusion: `edge_weight` must have"):
        projected_attention_diffusion(x, weight, bias, graph, heads=2, edge_weight=x[:, 0])


def bad_calls():
    p = problem(40, 4, 2, 3)
    x, q, k, x0 = p["x"], p["q"], p["k"], p["x0"]
    yield "graph", TypeError, "Graph.from_edge_index", lambda g: (x, q, k, torch.ones(2, 3))
    yield "x", ValueError, r"\[N, d\] = \[40, ≥1\], got \[39, 4\]", lambda g: (x[1:], q, k, g)
    yield "x", TypeError, "float", lambda g: (x.long(), q, k, g)
    yield "q", ValueError, "view", lambda g: (x, q.flatten(1), k.flatten(1), g)
    yield "q", TypeError, "float64", lambda g: (x, q.float(), k, g)
    yield "k", ValueError, r"\[40, 2, 3\]", lambda g: (x, q, k[:, :1], g)
    yield "alpha", ValueError, "scalar", lambda g: (x, q, k, g, {"alpha": torch.ones(3)})
    yield "alpha", TypeError, "float", lambda g: (x, q, k, g, {"alpha": "1"})
    yield "x0", ValueError, "beta", lambda g: (x, q, k, g, {"beta": 1.0})
    yield "beta", ValueError, "x0", lambda g: (x, q, k, g, {"x0": x0})
    yield "x0", ValueError, "shape", lambda g: (x, q, k, g, {"x0": x0[1:], "beta": 1.0})
    yield "add", TypeError, "pairs", lambda g: (x, q, k, g, {"add": [x]})
    yield "add", ValueError, "shape", lambda g: (x, q, k, g, {"add": [(1.0, x0[1:])]})
    yield "score", ValueError, "scaled_dot, cosine", lambda g: (x, q, k, g, {"score": "dot"})
    yield "score", TypeError, r"ops\.ExpKernel\(\), got int", lambda g: (x, q, k, g, {"score": 1})
    yield "q", ValueError, r"\[N, H, 1\] .*'gat', got d_k = 3\. Project", lambda g: (
        x, q, k, g, {"score": "gat"},
    )  # fmt: skip
    yield "edge_weight", ValueError, r"\[E\] = \[200\], got \[40\]", lambda g: (
        x, q, k, g, {"edge_weight": x[:, 0]},
    )  # fmt: skip
    yield "normalizer", ValueError, "softmax", lambda g: (x, q, k, g, {"normalizer": "max"})
    yield "normalize", ValueError, "receiver", lambda g: (x, q, k, g, {"normalize": "row"})
    yield "backend", ValueError, "reference", lambda g: (x, q, k, g, {"backend": "tpu"})
    yield "gpu", RuntimeError, "(no GPU|CUDA).*float64", lambda g: (x, q, k, g, {"backend": "gpu"})


@pytest.mark.parametrize(
    ("argument", "error", "text", "call"),
    list(bad_calls()),
    ids=[f"{i}-{c[0]}" for i, c in enumerate(bad_calls())],
)
def test_bad_input(argument, error, text, call):
    *args, last = call(random_graph("random"))
    args, options = ([*args, last], {}) if not isinstance(last, dict) else (args, last)
    with pytest.raises(error, match=text) as caught:
        attention_diffusion(*args, **options)
    line = str(caught.value)
    assert line.startswith("attention_diffusion: ") and argument in line and "\n" not in line


def test_half_precision_falls_back_and_says_so(caplog):
    graph = random_graph("random")
    p = {k: t.bfloat16() for k, t in problem(graph.num_nodes, 4, 2, 3).items()}
    p["alpha"], p["beta"] = p["alpha"].float(), p["beta"].float()
    with caplog.at_level("WARNING", logger="grand_fast"):
        f = run(graph)(**p, backend="auto")
    assert f.dtype == torch.bfloat16
    want = run(graph)(**{k: t.double() for k, t in p.items()}, backend="reference")
    assert_close("f", f, want)


def test_backend_block_and_environment(monkeypatch):
    graph = random_graph("random")
    p = problem(graph.num_nodes, 4, 2, 3)
    with gf.backend("gpu"), pytest.raises(RuntimeError, match="no GPU|CUDA"):
        run(graph)(**p, backend="auto")
    monkeypatch.setenv("GRAND_FAST_BACKEND", "gpu")
    with pytest.raises(RuntimeError, match="no GPU|CUDA"):
        run(graph)(**p, backend="auto")
    with gf.backend("cpu"):
        assert math.isfinite(float(run(graph)(**p, backend="auto").sum()))


def test_nan_spreads_as_in_the_reference():
    graph = random_graph("random")
    n = graph.num_nodes
    x, q, k = torch.randn(n, 5), torch.randn(n, 2, 3), torch.randn(n, 2, 3)
    k[n // 2] = math.nan
    leaves = [t.requires_grad_() for t in (x, q, k)]
    where = []
    for backend in ("cpu", "reference"):
        f = gf.ops.attention_diffusion(*leaves, graph, backend=backend)
        grads = torch.autograd.grad(f, leaves, torch.ones_like(f))
        where.append([t.isnan() for t in (f, *grads)])
    assert bool(where[0][1].any())
    assert all(torch.equal(a, b) for a, b in zip(*where, strict=True))
