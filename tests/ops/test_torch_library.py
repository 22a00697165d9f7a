"""The operators as `torch.ops.grand_fast`, and what a call costs beside its kernel."""

import gc
import sys
import weakref

import pytest
import torch

import grand_fast as gf
from grand_fast.graph import arrays as graphs
from grand_fast.kernels.cpu import rows
from grand_fast.kernels.weighting import scaled_dot
from grand_fast.ops import _autograd
from grand_fast.ops.backends import launchers, plan
from grand_fast.testing import assert_close, random_graph

from ._calls import tensors
from ._problems import normal

GRAPH = random_graph("empty_rows", 12)
ARRAYS = list(GRAPH._arrays())
SOFTMAX = (scaled_dot(3).scale, "identity", 0.0, "softmax", "receiver")
SQUAREPLUS = (0.5, "exp", 0.0, "squareplus", "sender")
OPS = torch.ops.grand_fast


def cases(name, dtype):
    t = tensors(GRAPH, dtype)
    w = normal(GRAPH.num_edges, seed=20).to(dtype).requires_grad_()
    edges = normal(GRAPH.num_edges, 2, 3, seed=21).to(dtype).requires_grad_()
    top = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    x, q, k, alpha = t["x"], t["q"], t["k"], t["alpha"]
    beta = torch.ones(5, dtype=dtype, requires_grad=True)
    sigma, length = (torch.tensor([v], dtype=dtype, requires_grad=True) for v in (1.3, 0.7))
    source, bare = (beta, t["x0"], [t["y"], x]), (None, None, [])
    plain, options = (0.0, []), (0.5, [2.0, 1.0])
    projections = (t["weight"], t["bias"])
    return {
        "attention_diffusion": [
            (x, q, k, alpha, None, None, *source, ARRAYS, "auto", *SOFTMAX, *options),
            (x, q, k, alpha, None, None, *bare, ARRAYS, "auto", *SOFTMAX, *plain),
            (x, q, k, alpha, w, top, *source, ARRAYS, "reference", *SQUAREPLUS, *options),
        ],
        "attention_product": [
            (q, q, k, None, None, None, None, ARRAYS, "auto", *SOFTMAX, True),
            (q, q, k, edges, edges, w, None, ARRAYS, "auto", *SOFTMAX, False),
            (q, q, k, None, edges, w, top, ARRAYS, "reference", *SQUAREPLUS, True),
        ],
        "edge_attention": [
            (q, k, None, None, ARRAYS, "auto", *SOFTMAX, False),
            (q, k, w, top, ARRAYS, "reference", *SQUAREPLUS, True),
        ],
        "csr_diffusion": [
            (x, t["a"], alpha, *source, ARRAYS, "auto", *options),
            (x, t["a"], alpha, *bare, ARRAYS, "auto", *plain),
        ],
        "projected_attention_diffusion": [
            (x, *projections, alpha, None, None, None, *source, ARRAYS, "auto", *SOFTMAX, 2,
             "scaled_dot", *options),
            (x, *projections, alpha, w, sigma, length, *source, ARRAYS, "auto", 1.0,
             *SQUAREPLUS[1:], 2, "exp_kernel", *options),
            (x, *projections, alpha, None, None, None, *bare, ARRAYS, "reference", *SOFTMAX, 2,
             "cosine", *plain),
        ],
        "score_top": [(q, k, w, ARRAYS, "reference", *SQUAREPLUS),
                      (q, k, None, ARRAYS, "reference", *SQUAREPLUS)],
        "edge_softmax": [
            (w[:, None], None, ARRAYS, "auto", 1.0, *SOFTMAX[1:]),
            (torch.stack([w, t["a"]], 1), top, ARRAYS, "auto", 1.0, "identity", *SQUAREPLUS[2:]),
        ],
        "spmm": [
            (x[:, None], w[:, None], ARRAYS, "auto"),
            (x[:, None], torch.stack([w, t["a"]], 1), ARRAYS, "auto"),
            (q, torch.stack([w, t["a"]], 1), ARRAYS, "reference"),
        ],
        "stage_update": [([x, t["y"]], [1.0, -0.5], "auto")],
    }[name]  # fmt: skip


NAMES = ["attention_diffusion", "attention_product", "edge_attention", "edge_softmax",
         "csr_diffusion", "projected_attention_diffusion", "score_top", "spmm",
         "stage_update"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    for args in cases(name, dtype):
        torch.library.opcheck(getattr(OPS, name).default, args)


def test_opcheck_of_a_backward():
    x, alpha, a = (t.detach() for t in map(tensors(GRAPH).get, ("x", "alpha", "a")))
    args = (x, x, a, alpha, [], ARRAYS, "auto", 0.5, [2.0], [True, False, True])
    torch.library.opcheck(OPS.csr_diffusion_backward.default, args)


def registered(t, arrays):
    options = (None, None, None, None, [], arrays, "auto", *SOFTMAX, 0.0, [])
    return OPS.attention_diffusion(t["x"], t["q"], t["k"], t["alpha"], *options)[0]


def test_nothing_is_planned_twice(monkeypatch):
    calls = []
    real = rows.plan
    monkeypatch.setattr(rows, "plan", lambda *args: calls.append(args) or real(*args))
    graph = random_graph("hub")
    t = tensors(graph)
    gf.ops.attention_diffusion(t["x"], t["q"], t["k"], graph).sum().backward()
    for _ in range(3):
        registered(t, list(graph._arrays())).sum().backward()
    assert len(calls) == 2  # A and Aᵀ


def test_one_array_alone_does_not_make_a_graph():
    """Two graphs with the same `rowptr` tensor keep views of their own."""
    t = tensors(GRAPH)
    want = registered(t, ARRAYS)
    n = GRAPH.num_nodes
    others = [GRAPH.edge_index()[0].flip(0), GRAPH.edge_index()[1]]
    other = gf.Graph.from_edge_index(torch.stack(others), n)
    mixed = [GRAPH.rowptr, *other._arrays()[1:]]
    assert torch.equal(GRAPH.rowptr, other.rowptr)
    assert_close("other", registered(t, mixed), registered(t, list(other._arrays())).double())
    assert_close("first", registered(t, ARRAYS), want.double())


def test_what_was_planned_goes_with_the_graph():
    gc.collect()  # graphs of other tests
    before = len(graphs._known)
    graph = random_graph("hub")
    t = tensors(graph)
    gf.ops.attention_diffusion(t["x"], t["q"], t["k"], graph).sum().backward()
    registered(t, list(graph._arrays()))
    work = weakref.ref(graph.csr(rows.plan).work.order)
    assert len(graphs._known) == before + 1 and work() is not None
    del graph
    gc.collect()
    assert len(graphs._known) == before and work() is None


CORA = (2708, 10556)


def _python_calls(call):
    """Functions of Python that a call enters, the second time."""
    call()
    entered = []
    sys.setprofile(lambda frame, event, _: entered.append(frame) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(entered)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_call_costs_little_beside_its_kernel(grad):
    n, e = CORA
    graph = gf.Graph.from_edge_index(torch.randint(0, n, (2, e)), n, self_loops=1.0)
    x, a, ones = torch.randn(n, 16), torch.rand(graph.num_edges), torch.ones(16)
    x.requires_grad_(grad)
    of_cpu, view = launchers("csr_diffusion", "cpu"), graph.csr(plan("cpu"))
    with torch.set_grad_enabled(grad):
        public = _python_calls(lambda: gf.ops.csr_diffusion(x, a, graph, edge_order="csr"))
    bare = _python_calls(
        lambda: of_cpu.csr_diffusion_fwd(x, a, alpha=ones, beta=None, x0=None, csr=view)
    )
    assert bare > 0 and public - bare < 60


def test_eager_calls_do_not_go_through_the_dispatcher(monkeypatch):
    # torch.library's autograd takes some 150 µs a call with lists of tensors
    def refused(*args):
        raise AssertionError("registered operator")

    monkeypatch.setattr(_autograd.Operator, "_run_forward", refused)
    t = tensors(GRAPH)
    gf.ops.attention_diffusion(t["x"], t["q"], t["k"], GRAPH).sum().backward()
