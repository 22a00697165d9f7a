import copy
import gc
import pickle

import pytest
import torch
from torch_geometric.nn.conv.gcn_conv import gcn_norm

import grand_fast as gf
from grand_fast.nn import GRAND
from grand_fast.nn.grand import VARIANTS
from grand_fast.testing import assert_close, random_edge_index, random_graph


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_and_adjoints_agree(variant, source):
    graph = random_graph("hub")
    model = GRAND(5, 6, 3, variant=variant, heads=2, attention_channels=4, T=2.5, source=source)
    model = model.double()
    if source:
        beta = model.field.beta if variant == "laplacian" else model.field.scale.beta
        torch.nn.init.constant_(beta, 0.3)
    x = torch.randn(graph.num_nodes, 5, dtype=torch.float64)
    results = []
    for backend, adjoint in (
        ("reference", "direct"),
        ("cpu", "direct"),
        ("cpu", "checkpoint"),
    ):
        model.adjoint = adjoint
        with gf.backend(backend):
            logits = model(x, graph)
            grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *grads])
    names = ["logits", *(name for name, _ in model.named_parameters())]
    scale = max(float(g.abs().max()) for g in results[0])
    for other in results[1:]:
        for name, got, want in zip(names, other, results[0], strict=True):
            if name == "field.key.bias":  # zero but for rounding
                assert got.abs().max() < 1e-12 * scale
            else:
                assert_close(name, got, want, tolerance=1e-10)


def test_linear_variant_freezes_the_attention_of_x0():
    graph = random_graph("loops")
    model = GRAND(4, 4, 2, variant="l", heads=2, T=3.0, method="euler").double()
    x = torch.randn(graph.num_nodes, 4, dtype=torch.float64)
    h = model.encoder(x)
    a = model.field.attention(h, graph).mean(1)
    alpha = model.field.scale.alpha
    for _ in range(3):
        h = h + gf.ops.csr_diffusion(h, a, graph, alpha=alpha)
    assert_close("logits", model(x, graph), model.decoder(torch.relu(h)))
    assert model.stats == gf.Stats(nfe=3, accepted=3, rejected=0)


def test_laplacian_variant_averages_neighbours():
    edges = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 2]])
    graph = gf.Graph.from_edge_index(edges, 3, torch.tensor([1.0, 1.0, 3.0, 1.0]))
    model = GRAND(1, 2, 2, variant="laplacian", T=1.0, method="euler", alpha=1.0)
    x = torch.randn(3, 1)
    h = model.encoder(x)
    want = torch.stack([0.25 * h[1] + 0.75 * h[2], h[0], h[2]])
    assert_close("logits", model(x, graph), model.decoder(torch.relu(want)))


def test_laplacian_variant_symmetric():
    graph = random_graph("loops")
    model = GRAND(2, 3, 2, variant="laplacian", laplacian="symmetric", T=1.0, alpha=1.0,
                  method="euler").double()  # fmt: skip
    x = torch.randn(graph.num_nodes, 2, dtype=torch.float64)
    edges, a = gcn_norm(graph.edge_index(), None, graph.num_nodes, add_self_loops=False,
                        dtype=torch.float64)  # fmt: skip
    h = model.encoder(x)
    want = torch.zeros_like(h).index_add(0, edges[1], a[:, None] * h[edges[0]])
    assert_close("logits", model(x, graph), model.decoder(torch.relu(want)))


OPTIONS = {
    "exp_kernel": {"score": "exp_kernel", "normalizer": "squareplus", "normalize": "sender"},
    "weights": {"reweight": True, "per_channel": True, "source": True},
    "mix": {"score": "gat", "mix_features": True, "source": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("variant", ["l", "nl"])
def test_options_reach_the_field(backend, variant, options):
    """Two Euler steps by hand, with the attention as the layer writes it out."""
    edges, n = random_edge_index("empty_rows")
    weight = 0.5 + torch.rand(edges.shape[1], dtype=torch.float64)
    graph = gf.Graph.from_edge_index(edges, n, weight)
    model = GRAND(3, 4, 2, variant=variant, heads=2, T=2.0, method="euler", **options).double()
    field = model.field
    if field.scale.beta is not None:
        torch.nn.init.constant_(field.scale.beta, 0.3)
    x = torch.randn(n, 3, dtype=torch.float64)
    with gf.backend(backend):
        got = model(x, graph)
        grads = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    h = h0 = model.encoder(x)
    with gf.backend("reference"):
        for _ in range(2):
            a = field.attention(h if variant == "nl" else h0, graph)
            v = field.values(h) if field.mix_features else [h, h]
            ah = sum(gf.ops.csr_diffusion(v[i], a[:, i], graph) + v[i] for i in range(2)) / 2
            f = field.scale.alpha * ((field.out(ah) if field.mix_features else ah) - h)
            h = h + (f if field.scale.beta is None else f + field.scale.beta * h0)
    want = model.decoder(torch.relu(h))
    assert_close("logits", got, want)
    wanted = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    got, want = (torch.cat([g.flatten() for g in gs]) for gs in (grads, wanted))
    assert_close("gradients", got, want, tolerance=1e-11)


def test_accepts_an_edge_index():
    edges, n = random_edge_index("random")
    model = GRAND(4, 8, 3, heads=2)
    x = torch.randn(n, 4)
    assert torch.equal(model(x, edges), model(x, gf.Graph.from_edge_index(edges, n)))


def test_learns_a_cycle_of_two_classes():
    n = 40
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    edges = torch.cat([ring, ring.flip(0)], dim=1)
    y = (torch.arange(n) >= n // 2).long()
    x = torch.nn.functional.one_hot(y, 2).float() + 1.5 * torch.randn(n, 2)
    model = GRAND(2, 16, 2, T=4.0, heads=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(x, edges), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_status_and_stats():
    graph = random_graph("random")
    model = GRAND(4, 8, 3, T=2.0)
    assert model.stats is None and model.status is None
    model(torch.randn(40, 4), graph)
    assert model.stats.nfe == 8 and model.status is gf.Status.SUCCESS
    assert (model.t, model.failure, model.nfe_backward) == (2.0, None, 0)
    model(torch.full((40, 4), float("nan")), graph)
    assert model.status is gf.Status.NON_FINITE


def test_status_of_a_solve_that_stops_early():
    graph, x = random_graph("random"), torch.randn(40, 4)
    model = GRAND(4, 8, 3, T=20.0, method="dopri5", rtol=1e-5, atol=1e-5, max_nfe=30)
    model(x, graph).sum().backward()
    assert model.status is gf.Status.MAX_STEPS and 0 < model.t < 20
    assert model.failure.startswith(f"MAX_STEPS at t = {model.t:g}: ")
    assert model.stats.nfe >= 30

    model = GRAND(4, 8, 3, T=1e3, method="dopri5").double()
    # dx/dt = x², which has no solution from t = 1 / x(0) on
    model.field.forward = lambda x, graph, x0=None, **options: x.square()
    model(x.double(), graph)
    assert model.status is gf.Status.STEP_TOO_SMALL and 0 < model.t < 1e3
    assert "larger tolerances" in model.failure


def test_evaluations_of_backward_are_counted_without_keeping_the_states():
    graph, x = random_graph("random"), torch.randn(40, 4)
    model = GRAND(4, 8, 3, T=2.0, adjoint="checkpoint")
    before = {id(o) for o in gc.get_objects() if type(o).__name__ == "NonlinearDiffusion"}
    logits = model(x, graph)
    assert model.nfe_backward == 0
    logits.sum().backward()
    assert model.nfe_backward == 8
    del logits
    gc.collect()
    terms = (o for o in gc.get_objects() if type(o).__name__ == "NonlinearDiffusion")
    assert not [o for o in terms if id(o) not in before] and model.nfe_backward == 8


SOLVES = {
    "dopri5": {"method": "dopri5"},
    "bosh3": {"method": "bosh3", "tol_scale": 1e3, "tol_convention": "paper"},
    "adaptive_heun": {"method": "adaptive_heun", "rtol": 1e-3, "atol": 1e-3},
    "midpoint": {"method": "midpoint", "step_size": 0.5},
    "explicit_adams": {"method": "explicit_adams", "step_size": 0.25},
    "implicit_adams": {"method": gf.solvers.ImplicitAdams(max_order=5), "step_size": 0.25},
    "semi_implicit_euler": {"method": gf.solvers.SemiImplicitEuler(tol=1e-12)},
}


@pytest.mark.parametrize("name", SOLVES)
def test_every_method_and_adjoint(name):
    graph = random_graph("random", 12)
    x = torch.randn(12, 4, dtype=torch.float64)
    torch.manual_seed(0)
    model = GRAND(4, 6, 3, heads=2, T=2.0, source=True, **SOLVES[name]).double()
    torch.nn.init.constant_(model.field.scale.beta, 0.3)
    grads = []
    for more in (
        {"adjoint": "direct"},
        {"adjoint": "checkpoint"},
        {"adjoint": "checkpoint", "memory_limit": 10**6},
        {"adjoint": "continuous", "adjoint_method": "dopri5", "tol_scale_adjoint": 1e-2},
    ):
        for option in ("adjoint", "memory_limit", "adjoint_method", "tol_scale_adjoint"):
            setattr(model, option, more.get(option))
        logits = model(x, graph)
        assert model.status is gf.Status.SUCCESS
        g = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        grads.append(torch.cat([p.flatten() for p in g]))
    direct, checkpoint, limited, continuous = grads
    assert_close("checkpoint", checkpoint, direct, tolerance=1e-12)
    assert_close("memory_limit", limited, direct, tolerance=1e-12)
    # That of the continuous problem, which coarse steps are not
    assert_close("continuous", continuous, direct, tolerance=0.3 if name[:4] == "semi" else 2e-2)


@pytest.mark.parametrize("options", [{}, {"mix_features": True}], ids=["l", "l-mixing"])
def test_the_continuous_adjoint_holds_weights_that_come_from_the_source(options):
    """Attention from x(0), which is the source too: its gradient passes each way once."""
    graph, x = random_graph("random", 12), torch.randn(12, 4, dtype=torch.float64)
    model = GRAND(
        4, 6, 3, variant="l", heads=2, T=2.0, method="dopri5", rtol=1e-9, atol=1e-10, source=True,
        **options,
    ).double()  # fmt: skip
    torch.nn.init.constant_(model.field.scale.beta, 0.3)
    names = [name for name, _ in model.named_parameters() if name != "field.key.bias"]  # 0
    grads = []
    for adjoint in ("direct", "continuous"):
        model.adjoint = adjoint
        loss = model(x, graph).square().sum()
        grads.append(torch.autograd.grad(loss, [model.get_parameter(name) for name in names]))
    for name, direct, continuous in zip(names, *grads, strict=True):
        assert_close(name, continuous, direct, tolerance=1e-6)


@pytest.mark.parametrize("variant", ["l", "nl", "laplacian"])
def test_a_graph_without_nodes(variant):
    graph = gf.Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 0)
    for method in ("rk4", "dopri5", "implicit_adams", "semi_implicit_euler"):
        model = GRAND(4, 8, 3, variant=variant, method=method, heads=2, source=True)
        logits = model(torch.zeros(0, 4), graph)
        logits.sum().backward()
        assert logits.shape == (0, 3) and model.status is gf.Status.SUCCESS


def test_copy_pickle_and_repr():
    model = GRAND(4, 8, 3, variant="l")
    graph, x = random_graph("random"), torch.randn(40, 4)
    want = model(x, graph)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, graph), want)
    assert "variant=l" in repr(model)


def test_bad_input():
    with pytest.raises(ValueError, match="one of l, nl, nl-rw, laplacian, mixed, got 'rw'"):
        GRAND(4, 8, 3, variant="rw")
    with pytest.raises(ValueError, match="`laplacian` must be one of random_walk, symmetric"):
        GRAND(4, 8, 3, variant="laplacian", laplacian="gcn")
    model = GRAND(4, 8, 3, method="rk9")
    with pytest.raises(ValueError, match="`method` must be one of euler"):
        model(torch.randn(40, 4), random_graph("random"))


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_gradient_of_features_that_nobody_scaled(seed):
    """Scores of 10⁵ saturate the attention: what is left is the gradient by the state."""
    torch.manual_seed(seed)
    edges, n = random_edge_index("random", seed=seed)
    model, x = GRAND(16, 8, 3, heads=2, T=2.0), 300 * torch.randn(n, 16)
    grads = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        copied = copy.deepcopy(model).to(dtype)
        with gf.backend(backend):
            copied(x.to(dtype), edges).logsumexp(1).sum().backward()
        assert copied.encoder.weight.grad is not None
        grads.append(copied.encoder.weight.grad.double())
    want, got = grads
    # A rounding of the largest score is some 0.01 of a weight.
    assert (got - want).norm() < 0.02 * want.norm()
