import copy
import pickle

import pytest
import torch

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
    model(torch.full((40, 4), float("nan")), graph)
    assert model.status is gf.Status.NON_FINITE


def test_copy_pickle_and_repr():
    model = GRAND(4, 8, 3, variant="l")
    graph, x = random_graph("random"), torch.randn(40, 4)
    want = model(x, graph)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, graph), want)
    assert "variant=l" in repr(model)


def test_bad_input():
    with pytest.raises(ValueError, match="`variant` must be one of l, nl, laplacian, got 'rw'"):
        GRAND(4, 8, 3, variant="rw")
    with pytest.raises(NotImplementedError, match="nl-rw"):
        GRAND(4, 8, 3, variant="nl-rw")
    model = GRAND(4, 8, 3, method="rk9")
    with pytest.raises(ValueError, match="`method` must be one of euler"):
        model(torch.randn(40, 4), random_graph("random"))
