"""What a layer is given, and who calls it: what fits works, all else is refused in a sentence."""

import math

import pytest
import torch
import torch_geometric.nn
from torch import nn
from torch.func import functional_call, grad, vmap
from torch_geometric.nn import HeteroConv, to_hetero

import grand_fast as gf
from grand_fast.graph.cached import _of_memory
from grand_fast.kernels.weighting import Weighting
from grand_fast.nn import GRAND, AttentionDiffusion, GRANDConv
from grand_fast.ops.scores import ScaledDot
from grand_fast.testing import assert_close, random_edge_index, random_graph

EDGES, N = random_edge_index("random")
GRAPH = gf.Graph.from_edge_index(EDGES, N)
D = 4
TRACED = r"must be called outside torch\.jit\.trace, .* Use torch\.compile, or torch\.export"
EITHER = pytest.mark.parametrize("make", [lambda: GRANDConv(D, method="euler"),
                                          lambda: GRAND(D, D, 2, method="euler")],
                                 ids=["GRANDConv", "GRAND"])  # fmt: skip


def state():
    return torch.randn(N, D)


@pytest.mark.parametrize("given", [(16,), (16, 2), (2, 8, True)])
def test_channels_alone_go_by_position(given):
    """PyG's (in_channels, out_channels) would be so many heads."""
    with pytest.raises(TypeError, match=r"^GRANDConv: `channels` must be the only positional "
                       rf"argument, got {1 + len(given)}\. .* GRANDConv\(channels, heads=…, "
                       r"attention_channels=…\)\.$"):  # fmt: skip
        GRANDConv(16, *given)
    conv = GRANDConv(16, heads=2, attention_channels=8)
    assert (conv.field.heads, conv.field.attention_channels) == (2, 8)


@pytest.mark.parametrize("sizes, text", [
    ({"channels": (4, 4)}, "`channels` must be an int, got tuple"),
    ({"channels": -1}, "`channels` must be at least 1, got -1"),
    ({"channels": 4, "attention_channels": 0}, "`attention_channels` must be at least 1, got 0"),
    ({"channels": 4, "heads": 2.0}, "`heads` must be an int, got float"),
])  # fmt: skip
def test_sizes(sizes, text):
    for layer in (GRANDConv, AttentionDiffusion):
        with pytest.raises((TypeError, ValueError), match=text):
            layer(**sizes)


@pytest.mark.parametrize("edges", [EDGES, GRAPH], ids=["edge_index", "Graph"])
@EITHER
def test_a_state_of_another_shape(make, edges):
    model = make()
    name = type(model).__name__
    for x, text in (
        (torch.randn(2, N, D), r"`x` must have shape \[N, .*\], got \[2, 40, 4\]\. Call it for "
         r"each x of a batch, or join its graphs as torch_geometric\.data\.Batch does\.$"),
        (torch.randn(N), r"`x` must have shape \[N, .*\], got \[40\]\.$"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: {text}"):
            model(x, edges)
    for x in (None, state().numpy()):
        with pytest.raises(TypeError, match=f"^{name}: `x` must be a Tensor"):
            model(x, edges)
    with pytest.raises(ValueError, match=r"`x` must have shape \[N, .*\[.*, 4\], got \[40, 7\]"):
        model(torch.randn(N, 7), edges)


def test_operators_name_the_shape_of_a_batch():
    x, q, a = torch.randn(2, N, D), torch.randn(N, 1, 2), torch.ones(GRAPH.num_edges)
    calls = (
        lambda: gf.ops.attention_diffusion(x, q, q, GRAPH),
        lambda: gf.ops.csr_diffusion(x, a, GRAPH),
        lambda: gf.ops.projected_attention_diffusion(
            x, torch.randn(4, D), torch.randn(4), GRAPH, heads=1
        ),
        lambda: AttentionDiffusion(D)(x, GRAPH),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"`x` must have shape .* = \[40, .*\], got \[2, 40, "
                           r"4\]\. Call it for each x of a batch"):  # fmt: skip
            call()


def test_an_encoder_may_take_a_state_of_its_own():
    model = GRAND(D, D, 2, method="euler")
    model.encoder = nn.Embedding(10, D)
    ids = torch.arange(N) % 10
    assert model(ids, EDGES).shape == (N, 2)
    with pytest.raises(NotImplementedError, match="^GRAND: `x` must be one Tensor"):
        model((ids, ids), EDGES)


@EITHER
def test_jit_trace(make):
    model, x = make(), state()
    for edges in (EDGES, GRAPH):
        module = nn.Module()
        module.model, module.forward = model, lambda x, edges=edges: model(x, edges)
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(NotImplementedError, match=TRACED):
                torch.jit.trace(module, (x,))
    with pytest.raises(NotImplementedError, match=f"^{type(model).__name__}: must be called"):
        torch.jit.trace(model, (x, EDGES))


def test_jit_trace_of_operators():
    x, a = state(), torch.ones(GRAPH.num_edges)
    for call in (
        lambda x: gf.ops.csr_diffusion(x, a, GRAPH),
        lambda x: gf.ops.stage_update([(2.0, x)]),
        lambda x: gf.ops.edge_attention(x[:, None], x[:, None], GRAPH),
    ):
        with pytest.raises(NotImplementedError, match=TRACED):
            torch.jit.trace(call, (x,))


@pytest.mark.parametrize("strict", [False, True])
@EITHER
def test_export(make, strict):
    model, x = make().eval(), state()
    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported)) as raised:
        torch.export.export(model, (x, EDGES), strict=strict)
    text = f"{type(model).__name__}: `edge_index` must be a Graph in an exported program, got a"
    assert text in str(raised.value) and "Graph.from_edge_index(edge_index" in str(raised.value)
    if not strict:
        program = torch.export.export(model, (x, GRAPH)).module()
        assert_close("exported", program(2 * x, GRAPH), model(2 * x, EDGES).double())


@EITHER
def test_compile_with_an_edge_index(make):
    model, x = make(), state()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close("compiled", compiled(x, EDGES), model(x, EDGES).double())


@EITHER
def test_two_states(make):
    model, x = make(), state()
    for pair in ((x, x[:3]), (x, None), [x, x]):
        text = r"`x` must be one Tensor \[N, .*\], got a .* of 2: .* Use HeteroConv .* or join the "
        text += r"types into one graph by HeteroData\.to_homogeneous\(\)\.$"
        with pytest.raises(NotImplementedError, match=f"^{type(model).__name__}: {text}"):
            model(pair, EDGES)


def test_heterogeneous_graphs():
    """Relations within a type of nodes have a layer each; two types have no common state."""
    x, more = {"a": state(), "b": torch.randn(6, D)}, torch.tensor([[0, 1, 5], [1, 2, 0]])
    within = {("a", "r", "a"): EDGES, ("a", "s", "a"): EDGES.flip(0), ("b", "t", "b"): more}
    convs = {relation: GRANDConv(D, T=2.0) for relation in within}
    got = HeteroConv(convs, aggr="sum")(x, within)
    want = sum(convs["a", r, "a"](x["a"], within["a", r, "a"]) for r in "rs")
    assert_close("a", got["a"], want.double())
    assert_close("b", got["b"], convs["b", "t", "b"](x["b"], more).double())

    across = within | {("a", "u", "b"): torch.tensor([[7, 8], [0, 1]])}
    net = torch_geometric.nn.Sequential("x, edge_index", [
        (GRANDConv(D), "x, edge_index -> x"),
    ])  # fmt: skip

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = net[0]

        def forward(self, x, edge_index):
            return self.conv(x, edge_index)

    hetero = to_hetero(Net(), (list(x), list(across)))
    with pytest.raises(NotImplementedError, match="^GRANDConv: `x` must be one Tensor .* Use Het"):
        hetero(x, across)


def test_edges_under_transforms():
    """They are no part of what is differentiated, and are kept as anywhere."""
    model, x = GRANDConv(D).double(), state().double()
    parameters = dict(model.named_parameters())

    def loss(parameters, x, edges):
        return functional_call(model, parameters, (x, edges)).square().sum()

    want = grad(lambda p: loss(p, x, GRAPH))(parameters)["field.query.weight"]
    before = len(_of_memory)
    edges = EDGES.clone()
    for _ in range(2):
        got = grad(loss)(parameters, x, edges)
        assert_close("edge_index", got["field.query.weight"], want)
        assert len(_of_memory) == before + 1
    got = grad(loss)(parameters, x, GRAPH)
    assert_close("Graph", got["field.query.weight"], want)
    matrix = torch.sparse_coo_tensor(EDGES.flip(0), torch.rand(EDGES.shape[1]), (N, N)).coalesce()
    of_coo, of_csr = (
        grad(lambda p, given=given: loss(p, x, given))(parameters)["field.query.weight"]
        for given in (matrix, matrix.to_sparse_csr())
    )
    assert_close("csr", of_csr, of_coo)
    with pytest.raises(NotImplementedError, match="^GRANDConv: `edge_index` must be the same"):
        vmap(lambda e: model(x, e))(torch.stack([EDGES, EDGES]))


def test_weights_of_a_matrix_under_transforms():
    model, x = GRANDConv(D).double(), state().double()
    edges = EDGES.unique(dim=1)
    weight = 0.5 + torch.rand(edges.shape[1], dtype=torch.float64)

    def of_matrix(w):
        return model(x, torch.sparse_coo_tensor(edges.flip(0), w, (N, N))).square().sum()

    want = grad(lambda w: model(x, edges, w).square().sum())(weight)
    assert_close("gradient", grad(of_matrix)(weight), want, tolerance=1e-11)


class DoubledDot(ScaledDot):
    """A score of a user's own, without a name that operators know."""

    name = "mine"

    def weighting(self, d_k):
        return Weighting(scale=2 / math.sqrt(d_k))


@pytest.mark.parametrize("variant", ["nl", "l"])
def test_a_score_of_ones_own(variant):
    graph, x = random_graph("loops", 20), torch.randn(20, 6)
    own = GRAND(6, 8, 2, variant=variant, heads=2, score=DoubledDot(), T=1.0)
    named = GRAND(6, 8, 2, variant=variant, heads=2, T=1.0)
    named.load_state_dict(own.state_dict())
    with torch.no_grad():
        named.field.query.weight.mul_(2)
        named.field.query.bias.mul_(2)
    assert_close("logits", own(x, graph), named(x, graph))
    weight, bias = torch.randn(8, 6), torch.randn(8)
    with pytest.raises(TypeError, match="`score` must be one of .*got DoubledDot.*attention_diff"):
        gf.ops.projected_attention_diffusion(x, weight, bias, graph, heads=2, score=DoubledDot())
