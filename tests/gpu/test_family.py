"""Every score, normaliser and direction in Triton's interpreter, against float64.

The cases have every pair of switches of the kernels, on rows of every length, in A and in Aᵀ.
"""

import functools

import pytest
import torch
from torch.autograd import grad

from ._mode import INTERPRETED, skip_module

if not INTERPRETED:
    skip_module(__file__)

from grand_fast.kernels.gpu import pieces
from grand_fast.ops import ExpKernel, attention_diffusion, attention_product, edge_attention
from grand_fast.testing import assert_close, random_graph

from ._compiled import PIECE_EDGES, make_graph
from ._memory import checked_memory

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")


CASES = [  # score, normaliser, direction, whether edges have weights; H, d_k
    ("scaled_dot", "softmax", "sender", True, (3, 7)),
    ("scaled_dot", "squareplus", "receiver", False, (4, 8)),
    ("scaled_dot", "squareplus", "sender", True, (8, 4)),
    ("exp_kernel", "softmax", "receiver", True, (2, 3)),
    ("exp_kernel", "squareplus", "sender", False, (1, 2)),
    ("gat", "softmax", "sender", False, (4, 1)),
    ("gat", "squareplus", "receiver", True, (3, 1)),
]
IDS = ["-".join((*case[:3], *["weighted"] * case[3])) for case in CASES]
# Each function of the dot product with each normaliser, and these with each direction
FEW = [CASES[i] for i in (0, 1, 3, 4, 6)]
# In squareplus every score's gradient holds that of the largest: more edges, and sums cancel less
MORE = (0, 1, 3, 4, 5, 0, 0, 8, 13, 16, 17, 41, 2, 7, 1, 3, 1, 2, 9, 0)
each_case = pytest.mark.parametrize("case", CASES, ids=IDS)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch, nan_filled):
    monkeypatch.setattr(pieces, "plan", functools.partial(pieces.plan, piece_edges=PIECE_EDGES))


def _inputs(graph, case, d=5):
    score, *_, has_weight, (h, d_k) = case
    n = graph.num_nodes
    shapes = {"x": (n, d), "alpha": (d,), "q": (n, h, d_k), "k": (n, h, d_k)}
    if has_weight:
        shapes["edge_weight"] = (graph.num_edges,)
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    if score == "exp_kernel":  # far from 0, and from a narrow bell
        inputs |= {"sigma": 1.5 + torch.rand(()), "lengthscale": 1.5 + torch.rand(())}
    return inputs


def _run(call, graph, inputs, case, backend, dtype=None, needs=None, **options):
    """The output, and the gradients of a fixed linear function of it, by name."""
    leaves = {
        name: value.to(dtype or value.dtype).requires_grad_(needs is None or name in needs)
        for name, value in inputs.items()
    }
    given = dict(leaves)
    score, normalizer, normalize = case[:3]
    if score == "exp_kernel":
        score = ExpKernel(given.pop("sigma"), given.pop("lengthscale"))
    out = call(
        graph=graph, score=score, normalizer=normalizer, normalize=normalize, backend=backend,
        **given, **options,
    )  # fmt: skip
    upstream = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    rounded = upstream.to(inputs["q"].dtype).to(out.dtype)
    grads = grad(out, list(wanted.values()), rounded)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(wanted, grads, strict=True)}


def _graph(case):
    return make_graph(MORE, 0.3) if case[1] == "squareplus" else make_graph()


def _compare(call, graph, inputs, case, **options):
    with checked_memory():
        got = _run(call, graph, inputs, case, "gpu", **options)
    want = _run(call, graph, inputs, case, "reference", torch.float64, **options)
    for name in want:
        # what is left of a sum over all nodes, which cancel
        tolerance = 1e-4 if name in ("dsigma", "dlengthscale") else None
        assert_close(name, got[name], want[name], tolerance=tolerance)


@each_case
def test_attention_diffusion(case):
    graph = _graph(case)
    _compare(attention_diffusion, graph, _inputs(graph, case), case)


@pytest.mark.parametrize("case", FEW, ids=[IDS[i] for i in map(CASES.index, FEW)])
def test_edge_attention(case):
    graph, mean_heads = _graph(case), CASES.index(case) % 2 == 0
    inputs = _inputs(graph, case)
    del inputs["x"], inputs["alpha"]
    _compare(edge_attention, graph, inputs, case, mean_heads=mean_heads)


@pytest.mark.parametrize(
    ("case", "tables"),
    [(CASES[0], ("edge_key", "edge_value")), (CASES[6], ("edge_value",))],
    ids=["sender-key-value", "gat-squareplus-value"],
)
def test_attention_product(case, tables):
    graph, d = _graph(case), 5
    inputs = _inputs(graph, case)
    n, h, d_k = inputs["q"].shape
    del inputs["x"], inputs["alpha"]
    inputs["values"] = torch.randn(n, h, d)
    for name in tables:
        inputs[name] = torch.randn(graph.num_edges, h, d_k if name == "edge_key" else d)
    reduce = "cat" if CASES.index(case) else "mean"
    _compare(attention_product, graph, inputs, case, reduce=reduce)


def _with_state_added(x, **others):
    return attention_diffusion(x=x, add=[(0.5, x)], **others)


@pytest.mark.parametrize(
    ("case", "needs"),
    [(CASES[0], {"x"}), (CASES[0], {"x", "alpha"}), (CASES[1], {"x", "k"})],
    ids=["sender-x", "sender-x-alpha", "receiver-x-k"],
)
def test_single_gradients(case, needs):
    """Where senders normalise, other kernels give dx if nobody asks for dq or dk."""
    graph = make_graph()
    _compare(_with_state_added, graph, _inputs(graph, case), case, needs=needs)


@pytest.mark.parametrize(
    ("case", "dtype"), [(CASES[2], torch.float16), (CASES[3], torch.bfloat16)], ids=str
)
def test_half_types_are_no_worse_than_pytorch(case, dtype):
    """`exp_kernel` brings q and k in float32."""
    graph = make_graph()
    inputs = {name: value.to(dtype) for name, value in _inputs(graph, case, d=8).items()}
    inputs |= {"alpha": inputs["alpha"].float()}
    got = _run(attention_diffusion, graph, inputs, case, "gpu")
    plain = _run(attention_diffusion, graph, inputs, case, "reference")
    want = _run(attention_diffusion, graph, inputs, case, "reference", torch.float64)
    for name, value in want.items():
        error = float((plain[name].double() - value).abs().max() / value.abs().max())
        assert got[name].dtype == inputs.get(name[1:], inputs["x"]).dtype
        tolerance = 2 * error + torch.finfo(dtype).eps / 2
        assert_close(name, got[name], value, tolerance=tolerance)


def test_no_nodes_and_no_edges():
    for kind in ("empty", "no_edges"):
        graph = random_graph(kind, 5)
        for case in (CASES[2], CASES[3]):
            _compare(attention_diffusion, graph, _inputs(graph, case), case)
