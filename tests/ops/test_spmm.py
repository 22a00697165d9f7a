import pytest
import torch

from grand_fast.ops import spmm
from grand_fast.testing import GRAPH_KINDS, assert_close, random_graph
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled")

# Heads of the values (None: [E]), and what follows N in the shape of x
SHAPES = {
    "vector": (None, ()),
    "table": (None, (5,)),
    "all_heads": (None, (3, 5)),
    "shared": (3, (5,)),
    "by_head": (3, (3, 5)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def problem(graph, heads, rest):
    of_edges = (graph.num_edges,) if heads is None else (graph.num_edges, heads)
    return {"values": normal(*of_edges, seed=2), "x": normal(graph.num_nodes, *rest, seed=1)}


def run(graph, edge_order="user"):
    def call(values, x, backend):
        return spmm(graph, values, x, edge_order=edge_order, backend=backend)

    return call


def dense(graph, values, x):
    """By the matrices written out."""
    sender, receiver = graph.edge_index()
    n, by_head = graph.num_nodes, values.dim() == 2
    a = values.new_zeros(n, n, values.shape[1] if by_head else 1)
    a = a.index_put((receiver, sender), values if by_head else values[:, None], accumulate=True)
    if not by_head:
        return torch.tensordot(a[:, :, 0], x, 1)
    return torch.einsum("ijh,jd->ihd" if x.dim() == 2 else "ijh,jhd->ihd", a, x)


@shapes
@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_against_dense_matrices(kind, shape, backend):
    graph = random_graph(kind)
    compare(
        run(graph), problem(graph, *shape), backend=backend, dtype=torch.float64,
        specification=lambda values, x: dense(graph, values, x),
    )  # fmt: skip


@dtypes
@pytest.mark.parametrize("rest", [(1,), (16,), (31,), (64,), (162,), (300,)], ids=str)
def test_widths(rest, dtype):
    graph = random_graph("hub")
    compare(run(graph), problem(graph, None, rest), backend="cpu", dtype=dtype)


@dtypes
@pytest.mark.parametrize("shared", [False, True], ids=["by_head", "shared"])
@pytest.mark.parametrize("shape", [(1, 7), (2, 16), (4, 8), (8, 4), (5, 40), (20, 2), (3, 130)],
                         ids=str)  # fmt: skip
def test_heads(shape, shared, dtype):
    heads, d = shape
    graph = random_graph("hub")
    inputs = problem(graph, heads, (d,) if shared else (heads, d))
    compare(run(graph), inputs, backend="cpu", dtype=dtype)


@shapes
def test_csr_order_is_the_user_order_permuted(shape, backend):
    graph = random_graph("hub")
    p = problem(graph, *shape)
    slots = {**p, "values": p["values"][graph.perm.long()]}
    assert torch.equal(
        run(graph, "csr")(**slots, backend=backend), run(graph)(**p, backend=backend)
    )


@shapes
def test_gradcheck(shape, backend):
    graph = random_graph("empty_rows", 8)
    inputs = tuple(t.requires_grad_() for t in problem(graph, *shape).values())
    assert torch.autograd.gradcheck(lambda *p: run(graph)(*p, backend=backend), inputs)


@shapes
@pytest.mark.parametrize("needed", ["values", "x"])
def test_one_gradient_alone(shape, needed):
    graph = random_graph("random")
    p = problem(graph, *shape)
    grads = []
    for name in ("cpu", "reference"):
        leaf = p[needed].clone().requires_grad_()
        y = run(graph)(**{**p, needed: leaf}, backend=name)
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    assert_close(f"d{needed}", *grads)


@shapes
def test_repeatable(shape):
    graph = random_graph("hub", 200)
    p = {k: t.float().requires_grad_() for k, t in problem(graph, *shape).items()}
    runs = []
    for _ in range(2):
        y = run(graph)(**p, backend="cpu")
        runs.append([y, *torch.autograd.grad(y.square().sum(), list(p.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tables_that_are_no_memory_of_their_own():
    """Columns of a wider table, transposed heads, values of every other edge."""
    graph = random_graph("hub")
    n, e = graph.num_nodes, graph.num_edges
    values, x = normal(3, 2 * e).t()[::2], normal(n, 3, 9, seed=1)
    for given in (x[:, :, 2:7], x[:, 0, 1:6], normal(3, n, 5).transpose(0, 1)):
        assert_close("y", spmm(graph, values, given), dense(graph, values, given))
    for given in (x[:, :, 0], x[:, :, 2:7]):
        assert_close("y", spmm(graph, values[:, 1], given), dense(graph, values[:, 1], given))


def test_nothing_has_a_row_for_each_edge():
    """Neither kept for backward nor made on the way: more bytes than all else takes."""
    graph = random_graph("hub", 400)
    n, e, d = graph.num_nodes, graph.num_edges, 64
    assert e > 20 * n
    values, x = torch.rand(e, 2, requires_grad=True), torch.randn(n, d, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        y = spmm(graph, values, x)
    assert sum(saved) <= 2 * e + n * d
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(spmm(graph, values, x).sum(), [values, x])
    assert max(event.cpu_memory_usage for event in profile.events()) < 4 * e * d
    assert y.shape == (n, 2, d)


def test_types_are_promoted_as_in_torch():
    graph = random_graph("random")
    p = problem(graph, 2, (2, 4))
    y = spmm(graph, p["values"].float(), p["x"])
    assert y.dtype == torch.float64
    assert_close("y", y, dense(graph, p["values"].float().double(), p["x"]))
    with torch.autocast("cpu", torch.bfloat16):
        low = spmm(graph, p["values"].float(), p["x"].bfloat16())
    assert low.dtype == torch.float32


@pytest.mark.slow
def test_arxiv(arxiv):
    compare(run(arxiv), problem(arxiv, 2, (8,)), backend="cpu", dtype=torch.float32)


GRAPH = random_graph("random")
N, E = GRAPH.num_nodes, GRAPH.num_edges


@pytest.mark.parametrize(
    ("values", "x", "error", "match"),
    [
        ((E - 1,), (N, 4), ValueError, rf"`values` must have shape \[E\] = \[{E}\], got \[{E - 1}"),
        ((E - 1, 2), (N, 4), ValueError, rf"`values` .*\[E, H\] = \[{E}, ≥1\], got \[{E - 1}, 2\]"),
        ((E, 2, 4), (N, 4), ValueError, r"`values` .*Values of H matrices are \[E, H\]\."),
        ((E,), (N + 1, 4), ValueError, rf"`x` must have shape \[N, d\] = \[{N}, ≥1\], got"),
        ((E,), (N, 0), ValueError, r"`x` must have shape \[N, d\]"),
        ((E,), (2, N, 3, 4), ValueError, r"`x` .*\[N, H, d\].* Call it for each x of a batch"),
        ((E, 2), (N, 3, 4), ValueError, rf"`x` .*\[N, H, d\] = \[{N}, 2, ≥1\], got \[{N}, 3, 4\]"),
        ((E, 2), (N,), ValueError, rf"`x` must have .*\[N, H, d\] = \[{N}, 2, ≥1\], got \[{N}\]"),
    ],
)  # fmt: skip
def test_bad_shapes(values, x, error, match):
    with pytest.raises(error, match=f"^spmm: {match}") as caught:
        spmm(GRAPH, torch.ones(values), torch.ones(x))
    assert "\n" not in str(caught.value)


def test_bad_input():
    values, x = torch.ones(E), torch.ones(N, 4)
    for match, call in {
        "`graph` must be a Graph, got Tensor.*Graph.from_edge_index": lambda: spmm(
            values, values, x
        ),
        "`values` must be a Tensor, got list": lambda: spmm(GRAPH, [1.0], x),
        r"`values` must be floating, got torch.int64. Try .float\(\)": lambda: spmm(
            GRAPH, values.long(), x
        ),
        "`x` must be a Tensor, got float": lambda: spmm(GRAPH, values, 1.0),
        "`x` must be dense, got torch.sparse_coo": lambda: spmm(GRAPH, values, x.to_sparse()),
    }.items():
        with pytest.raises(TypeError, match=f"^spmm: {match}"):
            call()
    with pytest.raises(ValueError, match="`x` must be on cpu, got meta"):
        spmm(GRAPH, values, x.to("meta"))
    with pytest.raises(ValueError, match="spmm: `edge_order` must be one of user, csr, got 'coo'"):
        spmm(GRAPH, values, x, edge_order="coo")
