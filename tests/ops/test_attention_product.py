import pytest
import torch

from grand_fast.ops import attention_product, edge_attention, spmm
from grand_fast.testing import GRAPH_KINDS, TOLERANCE, assert_close, random_graph
from tests._pairwise import pairwise
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled")

REDUCE = ("mean", "cat")
KEY, VALUE = "edge_key", "edge_value"
TABLES = {"none": (), "key": (KEY,), "value": (VALUE,), "both": (KEY, VALUE)}


def problem(graph, heads, d, d_k, tables=()):
    n, e = graph.num_nodes, graph.num_edges
    shapes = {"edge_key": (e, heads, d_k), "edge_value": (e, heads, d)}
    made = {"values": normal(n, heads, d, seed=1), "q": normal(n, heads, d_k, seed=2)}
    made["k"] = normal(n, heads, d_k, seed=3)
    return made | {name: normal(*shapes[name], seed=4 + len(name)) for name in tables}


def run(graph, **options):
    def call(values, q, k, backend="auto", **more):
        return attention_product(values, q, k, graph, backend=backend, **more, **options)

    return call


def by_node(graph, values, q, k, edge_key=None, edge_value=None, reduce="mean"):
    """Receiver by receiver, as the docstring has it."""
    sender, receiver = graph.edge_index()
    keys = k[sender] if edge_key is None else k[sender] + edge_key
    messages = values[sender] if edge_value is None else values[sender] + edge_value
    s = (q[receiver] * keys).sum(2) / q.shape[2] ** 0.5
    rows = []
    for node in range(graph.num_nodes):
        into = receiver == node
        rows.append((torch.softmax(s[into], 0)[:, :, None] * messages[into]).sum(0))
    y = torch.stack(rows) if rows else values
    return y.mean(1) if reduce == "mean" else y.flatten(1)


@pairwise(reduce=REDUCE, tables=TABLES, kind=GRAPH_KINDS)
def test_against_its_equation(kind, tables, reduce, backend):
    graph = random_graph(kind)
    compare(
        run(graph, reduce=reduce), problem(graph, 3, 5, 2, tables), backend=backend,
        dtype=torch.float64, specification=lambda **p: by_node(graph, **p, reduce=reduce),
    )  # fmt: skip


DOUBLE, SINGLE = torch.float64, torch.float32
SHAPES = [
    (1, 7, 20, DOUBLE),
    (8, 8, 2, SINGLE),
    (20, 2, 5, SINGLE),
    (3, 90, 1, SINGLE),
]  # H, d, d_k
SOME = {"bare": (), "both": (KEY, VALUE)}


@pairwise(shape=SHAPES, reduce=REDUCE, tables=SOME)
def test_heads_and_widths(shape, reduce, tables):
    graph = random_graph("hub")
    *sizes, dtype = shape
    inputs = problem(graph, *sizes, tables)
    compare(run(graph, reduce=reduce), inputs, backend="cpu", dtype=dtype)


@pairwise(
    score=("scaled_dot", "cosine", "exp_kernel", "gat"), normalizer=("softmax", "squareplus"),
    normalize=("receiver", "sender"), reduce=REDUCE, weighted={"bare": False, "weighted": True},
)  # fmt: skip
def test_every_weighting(score, normalizer, normalize, reduce, weighted):
    graph = random_graph("hub")
    of_keys = score in ("scaled_dot", "gat") and normalizer == "softmax"
    inputs = problem(graph, 3, 5, 1 if score == "gat" else 4, (KEY, VALUE) if of_keys else (VALUE,))
    if weighted:
        inputs["edge_weight"] = normal(graph.num_edges, seed=8)
    options = {"score": score, "normalizer": normalizer, "normalize": normalize, "reduce": reduce}
    compare(run(graph, **options), inputs, backend="cpu", dtype=torch.float64)


@pytest.mark.parametrize("normalizer", ["softmax", "squareplus"])
def test_weights_are_those_of_edge_attention(normalizer, backend):
    graph = random_graph("repeated")
    p = problem(graph, 3, 5, 2)
    options = {"normalizer": normalizer, "normalize": "sender", "backend": backend}
    a = edge_attention(p["q"], p["k"], graph, **options)
    want = spmm(graph, a, p["values"], backend=backend)
    assert_close("y", run(graph, reduce="cat")(**p, **options), want.flatten(1))


@pytest.mark.parametrize("reduce", REDUCE)
def test_csr_order_is_the_user_order_permuted(reduce, backend):
    graph = random_graph("hub")
    p = problem(graph, 3, 5, 2, (KEY, VALUE))
    slots = {name: t[graph.perm.long()] if name in (KEY, VALUE) else t for name, t in p.items()}
    got = run(graph, reduce=reduce, edge_order="csr")(**slots, backend=backend)
    assert torch.equal(got, run(graph, reduce=reduce)(**p, backend=backend))


def test_gradcheck(backend):
    graph = random_graph("empty_rows", 8)
    inputs = {k: t.requires_grad_() for k, t in problem(graph, 2, 3, 2, (KEY, VALUE)).items()}

    def call(*given):
        return run(graph)(**dict(zip(inputs, given, strict=True)), backend=backend)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pairwise(needed=("values", "q", "k", KEY, VALUE), reduce=REDUCE, side=("receiver", "sender"))
def test_one_gradient_alone(needed, reduce, side):
    graph = random_graph("random")
    p = problem(graph, 3, 5, 2, (KEY, VALUE))
    grads = []
    for backend in ("cpu", "reference"):
        leaf = p[needed].clone().requires_grad_()
        y = run(graph, reduce=reduce, normalize=side)(**{**p, needed: leaf}, backend=backend)
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    assert_close(f"d{needed}", *grads)


def test_repeatable():
    graph = random_graph("hub", 110)  # long enough for pieces
    p = problem(graph, 3, 5, 2, (KEY, VALUE))
    p = {k: t.float().requires_grad_() for k, t in p.items()}
    runs = []
    for _ in range(2):
        y = run(graph)(**p, backend="cpu")
        runs.append([y, *torch.autograd.grad(y.square().sum(), list(p.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_equal_values_are_their_own_mean(backend):
    """Weights sum to 1, so that values which all senders share come out, edges or not."""
    graph = random_graph("hub")
    p = problem(graph, 3, 5, 2, (KEY,))
    p["values"] = p["values"][:1].expand_as(p["values"])
    y = run(graph)(**p, backend=backend)
    receives = (graph.rowptr.diff() > 0)[:, None]
    assert_close("y", y, torch.where(receives, p["values"].mean(1), 0.0))


def test_the_same_table_may_be_both(backend):
    """As in PyG's `TransformerConv`; its gradient is the sum of both, and it is copied once."""
    graph = random_graph("hub")
    p = problem(graph, 3, 5, 5, (KEY,))
    grads, kept = [], set()
    for name in (backend, "reference"):
        leaf = p[KEY].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.add(t.data_ptr()) or t if t.shape == leaf.shape else t, lambda t: t
        ):
            y = run(graph)(**{**p, KEY: leaf, VALUE: leaf}, backend=name)
        assert name == "reference" or len(kept) == 1
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    assert_close("d", *grads)


def test_tables_that_are_no_memory_of_their_own():
    """Columns of a wider table, transposed heads, rows of every other edge."""
    graph = random_graph("random")
    n, e = graph.num_nodes, graph.num_edges
    given = {
        "values": normal(n, 3, 9)[:, :, 2:7], "q": normal(3, n, 4, seed=1).transpose(0, 1),
        "k": normal(n, 2, 3, 4, seed=2)[:, 1], KEY: normal(2 * e, 3, 4, seed=3)[::2],
        VALUE: normal(3, e, 5, seed=4).transpose(0, 1),
    }  # fmt: skip
    assert not any(t.is_contiguous() for t in given.values())
    compare(run(graph), given, backend="cpu", dtype=torch.float64)
    assert_close("y", run(graph)(**given, backend="cpu"), by_node(graph, **given))


def test_nothing_has_a_row_for_each_edge():
    """Neither kept for backward nor made on the way: more bytes than all else takes."""
    graph = random_graph("hub", 110)
    n, e, h, d = graph.num_nodes, graph.num_edges, 3, 5
    assert e > 20 * n
    p = {k: t.float().requires_grad_() for k, t in problem(graph, h, d, 2).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        y = run(graph)(**p)
    assert sum(saved) <= n * h * (d + 2 * 2 + 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(run(graph)(**p).sum(), list(p.values()))
    assert max(event.cpu_memory_usage for event in profile.events()) < 4 * e * h
    assert y.shape == (n, d)


def test_types_are_promoted_as_in_torch():
    graph = random_graph("random")
    p = problem(graph, 2, 4, 3)
    w = torch.ones(graph.num_edges, dtype=torch.float64)
    y = run(graph)(**{k: t.float() for k, t in p.items()}, edge_weight=w)
    assert y.dtype == torch.float64
    assert_close("y", y, by_node(graph, **p), tolerance=TOLERANCE[torch.float32])
    with torch.autocast("cpu", torch.bfloat16):
        low = run(graph)(**{**{k: t.float() for k, t in p.items()}, "q": p["q"].bfloat16()})
    assert low.dtype == torch.float32


@pytest.mark.slow
def test_arxiv(arxiv):
    compare(run(arxiv), problem(arxiv, 2, 8, 4), backend="cpu", dtype=torch.float32)


GRAPH = random_graph("random")
N, E = GRAPH.num_nodes, GRAPH.num_edges


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"values": (N, 4)}, ValueError, r"`values` must have shape \[N, H, d\]"),
        ({"values": (N + 1, 2, 4)}, ValueError, rf"`values` .* = \[{N}, ≥1, ≥1\], got"),
        ({"values": (N, 3, 4)}, ValueError, rf"`values` .* = \[{N}, 2, ≥1\], got \[{N}, 3, 4\]"),
        ({"q": (N, 2, 5)}, ValueError, r"`k` must have shape \[N, H, d_k\]"),
        ({KEY: (E, 2, 4)}, ValueError, rf"`edge_key` .*\[E, H, d_k\] = \[{E}, 2, 3\], got"),
        ({KEY: (E - 1, 2, 3)}, ValueError, rf"`edge_key` .*got \[{E - 1}, 2, 3\]"),
        ({VALUE: (E, 2, 3)}, ValueError, rf"`edge_value` .*\[E, H, d\] = \[{E}, 2, 4\], got"),
        ({VALUE: (E, 4)}, ValueError, r"`edge_value` must have shape \[E, H, d\]"),
        ({"edge_weight": (E, 2)}, ValueError, r"`edge_weight` must have shape \[E\]"),
        ({"reduce": "sum"}, ValueError, "`reduce` must be one of mean, cat, got 'sum'"),
        ({"edge_order": "coo"}, ValueError, "`edge_order` must be one of user, csr, got 'coo'"),
        ({"normalizer": "sum"}, ValueError, "`normalizer` must be one of softmax, squareplus"),
        ({KEY: (E, 2, 3), "normalizer": "squareplus"}, NotImplementedError,
         "`edge_key` must be None but for .*score 'scaled_dot' and normalizer 'squareplus'"),
        ({KEY: (E, 2, 3), "score": "cosine"}, NotImplementedError,
         "`edge_key` must be None but for .*got a Tensor with score 'cosine'"),
    ],
)  # fmt: skip
def test_bad_input(change, error, match):
    given = {"values": (N, 2, 4), "q": (N, 2, 3), "k": (N, 2, 3)} | change
    tables = {k: torch.ones(v) if isinstance(v, tuple) else v for k, v in given.items()}
    with pytest.raises(error, match=f"^attention_product: {match}") as caught:
        attention_product(graph=GRAPH, **tables)
    assert "\n" not in str(caught.value)


def test_bad_types():
    x = torch.ones(N, 2, 4)
    for match, call in {
        "`graph` must be a Graph, got Tensor": lambda: attention_product(x, x, x, x),
        "`values` must be a Tensor, got list": lambda: attention_product([1.0], x, x, GRAPH),
        "`q` must be .*float32, got torch.float64": lambda: attention_product(
            x, x.double(), x.double(), GRAPH
        ),
        "`edge_value` must be a Tensor, got float": lambda: attention_product(
            x, x, x, GRAPH, edge_value=1.0
        ),
        "`edge_key` must be floating, got torch.int64": lambda: attention_product(
            x, x, x, GRAPH, edge_key=torch.ones(E, 2, 4).long()
        ),
    }.items():
        with pytest.raises(TypeError, match=f"^attention_product: {match}"):
            call()
