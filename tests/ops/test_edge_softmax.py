from functools import partial

import pytest
import torch

from grand_fast.ops import edge_softmax
from grand_fast.testing import GRAPH_KINDS, assert_close, random_graph
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled")

CHOICES = [
    {"normalizer": normalizer, "normalize": normalize}
    for normalizer in ("softmax", "squareplus")
    for normalize in ("receiver", "sender")
]
choices = pytest.mark.parametrize("options", CHOICES, ids=lambda o: "-".join(o.values()))


def scores_of(graph, heads, scale=2.0):
    shape = (graph.num_edges,) if heads is None else (graph.num_edges, heads)
    return normal(*shape, scale=scale, seed=3)


def run(graph, options):
    return lambda scores, backend: edge_softmax(scores, graph, backend=backend, **options)


def dense(scores, graph, normalizer, normalize):
    """By tables `[N, E]` of which edge is in which group."""
    group = graph.edge_index()[1 if normalize == "receiver" else 0]
    member = group == torch.arange(graph.num_nodes)[:, None]
    s = scores if scores.dim() == 2 else scores[:, None]
    if normalizer == "softmax":
        table = s.t()[:, None].masked_fill(~member, -torch.inf)  # [H, N, E]
        a = table.softmax(2).where(member, 0.0).sum(1).t()
    else:
        v = s - s.amax() if s.numel() else s
        p = (v + (v * v + 4).sqrt()) / 2
        a = p / (member.to(p.dtype) @ p)[group]
    return a.view(scores.shape)


@choices
@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_against_dense_tables(kind, heads, options, backend):
    graph = random_graph(kind)
    compare(
        run(graph, options), {"scores": scores_of(graph, heads)}, backend=backend,
        dtype=torch.float64, tolerance=1e-11, specification=partial(dense, graph=graph, **options),
    )  # fmt: skip


@choices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4, 5, 8, 16, 20])
def test_heads(heads, dtype, options):
    graph = random_graph("hub")
    compare(run(graph, options), {"scores": scores_of(graph, heads)}, backend="cpu", dtype=dtype)


@choices
def test_groups_sum_to_one_whatever_the_scores(options, backend):
    graph = random_graph("loops")
    group = graph.edge_index()[1 if options["normalize"] == "receiver" else 0]
    for scale in (0.0, 1.0, 1e4):
        a = run(graph, options)(scores_of(graph, 2, scale).float(), backend)
        sums = a.new_zeros(graph.num_nodes, 2).index_add(0, group, a)
        assert_close("sums", sums, torch.ones_like(sums).double())


@choices
def test_csr_order_is_the_user_order_permuted(options, backend):
    graph = random_graph("hub")
    scores, slots = scores_of(graph, 3), graph.perm.long()
    a = run(graph, options)(scores, backend)
    assert torch.equal(
        run(graph, options | {"edge_order": "csr"})(scores[slots], backend), a[slots]
    )


@choices
def test_gradcheck(options, backend):
    graph = random_graph("empty_rows", 8)
    scores = scores_of(graph, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: run(graph, options)(s, backend), scores)


@choices
def test_repeatable(options):
    graph = random_graph("hub", 200)
    scores = scores_of(graph, 3).float().requires_grad_()
    runs = []
    for _ in range(2):
        a = run(graph, options)(scores, "cpu")
        runs.append([a, *torch.autograd.grad(a.square().sum(), scores)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_largest_score_in_equal_parts(backend):
    """Of squareplus the gradient goes to all edges and heads that have it, as that of amax."""
    graph = random_graph("random")
    scores = scores_of(graph, 2)
    scores[3, 1] = scores[7, 0] = 9.0
    compare(
        run(graph, CHOICES[2]), {"scores": scores}, backend=backend, dtype=torch.float64,
        tolerance=1e-11, specification=partial(dense, graph=graph, **CHOICES[2]),
    )  # fmt: skip


def test_what_is_kept_for_backward():
    graph = random_graph("hub", 400)
    scores = scores_of(graph, 2).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        edge_softmax(scores, graph)
    assert sum(saved) == 2 * graph.num_edges + 4 * graph.num_nodes


GRAPH = random_graph("random")
E = GRAPH.num_edges
SCORES = torch.ones(E, 2)


@pytest.mark.parametrize(
    ("scores", "options", "error", "match"),
    [
        (torch.ones(E - 1), {}, ValueError, rf"`scores` .*\[E\] = \[{E}\], got .*\[E, H\]\."),
        (torch.ones(E, 0), {}, ValueError, rf"`scores` .*\[E, H\] = \[{E}, ≥1\], got \[{E}, 0\]"),
        (torch.ones(E, 2, 1), {}, ValueError, r"`scores` .*Scores of H heads are \[E, H\]"),
        (SCORES.long(), {}, TypeError, r"`scores` must be floating.*Try .float\(\)"),
        ([1.0], {}, TypeError, "`scores` must be a Tensor, got list"),
        (SCORES.to("meta"), {}, ValueError, "`scores` must be on cpu, got meta"),
        (SCORES, {"normalizer": "sum"}, ValueError, "`normalizer` must be one of softmax, squ"),
        (SCORES, {"normalize": "both"}, ValueError, "`normalize` must be one of receiver, sender"),
        (SCORES, {"edge_order": "coo"}, ValueError, "`edge_order` must be one of user, csr"),
        (SCORES, {"graph": None}, TypeError, "`graph` must be a Graph, got NoneType"),
    ],
)
def test_bad_input(scores, options, error, match):
    with pytest.raises(error, match=f"^edge_softmax: {match}") as caught:
        edge_softmax(scores, **{"graph": GRAPH} | options)
    assert "\n" not in str(caught.value)
