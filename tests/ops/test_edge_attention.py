import pytest
import torch

from grand_fast import ops
from grand_fast.ops import edge_attention
from grand_fast.testing import GRAPH_KINDS, assert_close, random_graph
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled")

SHAPES = [(1, 1), (3, 5), (4, 8), (2, 16), (8, 16), (1, 64), (16, 3), (20, 2)]  # H, d_k


def problem(graph, heads, d_k):
    n = graph.num_nodes
    return {"q": normal(n, heads, d_k, seed=2), "k": normal(n, heads, d_k, seed=3)}


def run(graph, **options):
    def call(q, k, backend):
        return edge_attention(q, k, graph, backend=backend, **options)

    return call


@pytest.mark.parametrize("mean_heads", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=["H{}-k{}".format(*s) for s in SHAPES])
def test_forward_and_backward(shape, dtype, mean_heads):
    graph = random_graph("hub")
    inputs = problem(graph, *shape)
    compare(run(graph, mean_heads=mean_heads), inputs, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("mean_heads", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_graphs(kind, mean_heads):
    graph = random_graph(kind)
    inputs = problem(graph, 3, 2)
    compare(run(graph, mean_heads=mean_heads), inputs, backend="cpu", dtype=torch.float32)


def test_rows_sum_to_one(backend):
    graph = random_graph("loops")
    a = edge_attention(**problem(graph, 3, 4), graph=graph, backend=backend)
    receiver = graph.edge_index()[1]
    sums = a.new_zeros(graph.num_nodes, 3).index_add(0, receiver, a)
    assert_close("sums", sums, torch.ones_like(sums))


def test_user_order_and_mean(backend):
    graph = random_graph("repeated")
    p = problem(graph, 3, 4)
    a = edge_attention(**p, graph=graph, backend=backend)
    sender, receiver = graph.edge_index()
    s = (p["q"][receiver] * p["k"][sender]).sum(2) / 2.0  # √d_k = 2
    for node in range(graph.num_nodes):
        rows = receiver == node
        assert_close(f"row {node}", a[rows], torch.softmax(s[rows], 0))
    slots = edge_attention(**p, graph=graph, edge_order="csr", backend=backend)
    assert torch.equal(slots, a[graph.perm.long()])
    mean = edge_attention(**p, graph=graph, mean_heads=True, backend=backend)
    assert_close("mean", mean, a.mean(1))


def test_equal_scores_give_equal_weights(backend):
    graph = random_graph("hub")
    p = {k: torch.zeros_like(t) for k, t in problem(graph, 2, 4).items()}
    a = edge_attention(**p, graph=graph, backend=backend, edge_order="csr")
    degree = graph.rowptr.diff().double()
    want = torch.repeat_interleave(1 / degree, graph.rowptr.diff())
    assert_close("a", a, want[:, None].expand_as(a))


def test_gradcheck(backend):
    graph = random_graph("empty_rows", 8)
    inputs = tuple(t.requires_grad_() for t in problem(graph, 2, 3).values())
    assert torch.autograd.gradcheck(lambda q, k: run(graph)(q, k, backend=backend), inputs)


@pytest.mark.slow
def test_arxiv(arxiv):
    inputs = {"q": normal(arxiv.num_nodes, 2, 4, seed=1), "k": normal(arxiv.num_nodes, 2, 4)}
    compare(run(arxiv), inputs, backend="cpu", dtype=torch.float32)


def test_bad_input():
    graph = random_graph("random")
    p = problem(graph, 2, 3)
    with pytest.raises(ValueError, match=r"edge_attention: `q` .*\[N, H, d_k\].*view"):
        edge_attention(p["q"].flatten(1), p["k"].flatten(1), graph)


WEIGHT = torch.ones(200, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"score": "dot"}, ValueError, "`score` must be one of scaled_dot, cosine, .*got 'dot'"),
        ({"score": None}, TypeError, r"`score` must be .*, or an object .*\(\), got NoneType"),
        ({"score": ops.GAT}, TypeError, "`score` must be .*, or an object"),
        ({"score": ops.GAT()}, ValueError, r"`q` .*\[N, H, 1\] for score 'gat', got d_k = 3\. Pro"),
        ({"normalizer": "sum"}, ValueError, "`normalizer` must be one of softmax, squareplus, got"),
        ({"normalizer": None}, ValueError, "`normalizer` must be one of softmax, squareplus, got"),
        ({"normalize": "both"}, ValueError, "`normalize` must be one of receiver, sender, got 'bo"),
        ({"edge_weight": WEIGHT[1:]}, ValueError, r"`edge_weight` .* \[200\], got \[199\]"),
        ({"edge_weight": WEIGHT[:, None]}, ValueError, r"`edge_weight` .*\[E\].*got \[200, 1\]"),
        ({"edge_weight": 1.0}, TypeError, "`edge_weight` must be a Tensor, got float"),
        ({"edge_weight": WEIGHT.long()}, TypeError, "`edge_weight` must be floating"),
        ({"edge_weight": WEIGHT.to("meta")}, ValueError, "`edge_weight` must be on cpu, got meta"),
    ],
)
def test_bad_options(options, error, match):
    graph = random_graph("random")
    assert graph.num_edges == len(WEIGHT)
    with pytest.raises(error, match=f"^edge_attention: .*{match}") as caught:
        edge_attention(**problem(graph, 2, 3), graph=graph, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ops.ExpKernel(sigma=0), ValueError, "`sigma` must be finite and not 0, got 0"),
        (lambda: ops.ExpKernel(1.0, 0.0), ValueError, "`lengthscale` must be finite and not 0"),
        (lambda: ops.ExpKernel(1.0, float("nan")), ValueError, "`lengthscale` must be .*, got nan"),
        (
            lambda: ops.ExpKernel("1"),
            TypeError,
            "`sigma` must be a float or a scalar Tensor, got s",
        ),
        (lambda: ops.ExpKernel(True), TypeError, "`sigma` must be a float .*, got bool"),
        (lambda: ops.ExpKernel(torch.ones(2)), ValueError, r"`sigma` .*, got .*shape \[2\]"),
        (lambda: ops.ExpKernel(torch.tensor(1)), ValueError, "`sigma` .* floating .*int64"),
        (lambda: ops.GAT("0.2"), TypeError, "`negative_slope` must be a float, got str"),
        (lambda: ops.GAT(float("inf")), ValueError, "`negative_slope` must be finite, got inf"),
    ],
)
def test_bad_scores(make, error, match):
    with pytest.raises(error, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)
