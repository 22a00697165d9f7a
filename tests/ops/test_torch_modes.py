"""Autocast, grad modes, determinism, copies, processes: what torch lets users do with modules."""

import copy
import io
import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import grand_fast as gf
from grand_fast.testing import assert_close, random_graph

from ._calls import CALLS, gradients, tensors

GRAPH = random_graph("hub", 20)


def model(**options):
    return gf.nn.GRAND(5, 4, 3, **{"heads": 2, "T": 2.0, "method": "rk4", **options})


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32], ids=str)
def test_autocast(name, given):
    exact = tensors(GRAPH, given)
    want = CALLS[name](GRAPH, **{n: t.float() for n, t in exact.items()})
    with torch.autocast("cpu", torch.bfloat16):
        got = CALLS[name](GRAPH, **exact)
    assert got.dtype == torch.float32
    assert_close("output", got, want.double())
    for g in gradients(got, exact.values()):
        assert g is None or (g.dtype == given and g.isfinite().all())


def test_autocast_takes_what_linear_layers_return():
    t = tensors(GRAPH)
    layer = nn.Linear(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        q = layer(t["x"]).view(-1, 2, 3)
        assert q.dtype == torch.bfloat16
        f = gf.ops.attention_diffusion(t["x"], q, k=q, graph=GRAPH, add=[(0.5, t["x"])])
        f.sum().backward()  # inside the region too
    assert layer.weight.grad.isfinite().all() and t["x"].grad.dtype == torch.float32
    with pytest.raises(TypeError, match=r"`q` must be torch.float32, got torch.bfloat16"):
        gf.ops.attention_diffusion(t["x"], q, q, GRAPH)


def test_autocast_leaves_float64():
    t = tensors(GRAPH, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        f = CALLS["attention_diffusion"](GRAPH, **t)
    assert torch.equal(f, CALLS["attention_diffusion"](GRAPH, **t))


@pytest.mark.parametrize("variant", ["nl", "l"])
def test_models_train_under_autocast(variant):
    net, x = model(variant=variant), tensors(GRAPH)["x"].detach()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x, GRAPH).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint", "continuous"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_adams", "semi_implicit_euler"])
def test_every_kind_of_solve_under_autocast(method, adjoint):
    """The encoder hands over bfloat16, the operators float32."""
    x, grads = tensors(GRAPH)["x"].detach(), []
    for enabled in (False, True):
        torch.manual_seed(0)
        net = model(method=method, adjoint=adjoint, step_size=0.5, source=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = net(x, GRAPH)
        assert net.status is gf.Status.SUCCESS
        logits.float().square().mean().backward()
        grads.append(net.encoder.weight.grad)
    assert_close("gradient", grads[1], grads[0].double(), tolerance=5e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "infer"])
@pytest.mark.parametrize("name", CALLS)
def test_without_gradients(name, mode):
    t = tensors(GRAPH)
    want = CALLS[name](GRAPH, **t)
    with mode():
        got = CALLS[name](GRAPH, **t)
    assert not got.requires_grad and torch.equal(got, want)
    assert torch.equal(CALLS[name](GRAPH, **t), want)  # and with them again


@pytest.mark.parametrize("name", CALLS)
def test_deterministic_algorithms(name):
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            t = tensors(GRAPH)
            out = CALLS[name](GRAPH, **t)
            runs.append([out, *(g for g in gradients(out, t.values()) if g is not None)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_unused_inputs():
    t = tensors(GRAPH)
    f = CALLS["bare"](GRAPH, **t)
    dx, dx0 = torch.autograd.grad(f.sum(), [t["x"], t["x0"]], allow_unused=True)
    assert dx.isfinite().all() and dx0 is None


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy,
                                    lambda o: pickle.loads(pickle.dumps(o))],
                         ids=["deepcopy", "copy", "pickle"])  # fmt: skip
def test_copies(copied):
    net, x = model(), tensors(GRAPH)["x"].detach()
    want = net(x, GRAPH)  # the graph is planned now, which no copy carries along
    graph = copied(GRAPH)
    assert torch.equal(copied(net)(x, graph), want)
    assert len(pickle.dumps(GRAPH)) < 2 * sum(a.nbytes for a in GRAPH._arrays()) + 4096


def test_weights_only_loading_of_a_graph():
    buffer = io.BytesIO()
    torch.save(GRAPH, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded.edge_index(), GRAPH.edge_index())


def test_state_dict_and_functional_call():
    first, second, x = model(source=True), model(source=True), tensors(GRAPH)["x"].detach()
    want = first(x, GRAPH)
    swapped = torch.func.functional_call(second, first.state_dict(), (x, GRAPH))
    assert torch.equal(swapped, want)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x, GRAPH), want)


def _train_on_one_rank(rank, world, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        torch.manual_seed(0)
        net = DistributedDataParallel(model())
        x = tensors(GRAPH)["x"].detach() + rank
        net(x, GRAPH).square().mean().backward()
        grads = [p.grad for p in net.module.parameters()]
        torch.save(grads, f"{folder}/{rank}.pt")
        # Neither may go while the other, or its own layer, still holds on to the group's threads
        del net
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(_train_on_one_rank, (2, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    net = model()
    x = tensors(GRAPH)["x"].detach()
    loss = sum(net(x + rank, GRAPH).square().mean() for rank in range(2)) / 2
    want = torch.autograd.grad(loss, list(net.parameters()))
    for rank in range(2):
        for got, of_one in zip(torch.load(tmp_path / f"{rank}.pt"), want, strict=True):
            assert_close("gradient", got, of_one.double())
