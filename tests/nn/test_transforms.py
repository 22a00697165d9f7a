"""`torch.func`, forward mode and batches of gradients through layers and models."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import grand_fast as gf
from grand_fast.kernels.stage_update import cpu
from grand_fast.nn import GRAND, GRANDConv
from grand_fast.testing import assert_close, random_graph

N, D = 8, 3
GRAPH = random_graph("empty_rows", N)
SOLVES = {
    "rk4": {},
    "l": {"variant": "l"},
    "dopri5": {"method": "dopri5", "rtol": 1e-2, "atol": 1e-2},
    "implicit_adams": {"method": "implicit_adams", "step_size": 0.5},
    "source": {"source": True, "score": "cosine", "normalizer": "squareplus"},
    "mix": {"mix_features": True, "heads": 3},
    "direct": {"adjoint": "direct"},
}
OTHER_SOLVES = {
    "semi_implicit_euler": {"method": "semi_implicit_euler"},
    "uniformisation": {"variant": "l", "method": "uniformisation"},
    "memory_limit": {"memory_limit": 10**6},
    "continuous": {"adjoint": "continuous"},
    "regularizers": {"regularizers": ["directional"]},
}
EACH = pytest.mark.parametrize("options", SOLVES.values(), ids=SOLVES)


@pytest.fixture(autouse=True)
def _kernels_for_small_tensors(monkeypatch):
    """Which are else combined by torch, whose operations batches pass through."""
    monkeypatch.setattr(cpu, "_LARGE_BYTES", 0)


def state(*more):
    return torch.randn(*more, N, D, dtype=torch.float64)


def conv(options):
    model = GRANDConv(D, **options).double()
    if model.field.scale.beta is not None:
        nn.init.constant_(model.field.scale.beta, 0.3)
    return model


def loss_of(model, parameters, x):
    torch.manual_seed(3)  # of dropout
    return functional_call(model, parameters, (x, GRAPH)).square().sum()


def compare_gradients(got, model, x):
    names, own = zip(*model.named_parameters(), strict=True)
    torch.manual_seed(3)
    want = torch.autograd.grad(model(x, GRAPH).square().sum(), own)
    # Together: some are zero but for rounding
    want = torch.cat([g.flatten() for g in want])
    assert_close("gradients", torch.cat([got[n].flatten() for n in names]), want, tolerance=1e-11)


@EACH
def test_grad_by_parameters(options):
    model, x = conv(options), state()
    parameters = dict(model.named_parameters())
    compare_gradients(grad(partial(loss_of, model))(parameters, x), model, x)
    assert model.status is gf.Status.SUCCESS and model.stats.nfe > 0


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_grad_of_a_model_with_dropout_and_its_ends(sparse):
    x = state()
    given = x.to_sparse_csr() if sparse else x
    model = GRAND(D, 4, 2, heads=2, dropout=0.4, input_dropout=0.3, encoder_channels=5).double()
    got = grad(partial(loss_of, model, x=given))(dict(model.named_parameters()))
    compare_gradients(got, model, given)


@EACH
def test_vjp_and_jacobians(options):
    model, x, v = conv(options), state(), state()

    def run(x):
        return model(x, GRAPH)

    want = jacobian(run, x)  # a gradient at a time
    y, pull = vjp(run, x)
    assert_close("output", y, run(x))
    assert_close("vjp", pull(v)[0], torch.einsum("ndij,nd->ij", want, v), tolerance=1e-11)
    assert_close("jacrev", jacrev(run)(x), want, tolerance=1e-11)
    assert_close("jacfwd", jacfwd(run)(x), want, tolerance=1e-11)
    tangent = torch.einsum("ndij,ij->nd", want, v)
    assert_close("jvp", jvp(run, (x,), (v,))[1], tangent, tolerance=1e-11)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(run(forward_ad.make_dual(x, v)))
        assert_close("dual", dual.tangent, tangent, tolerance=1e-11)


@pytest.mark.parametrize("name", [*SOLVES, *OTHER_SOLVES])
def test_batches_of_gradients(name):
    """Kernels take plain tensors, checkpoints run again within the batch."""
    model, x = conv((SOLVES | OTHER_SOLVES)[name]), state()
    own = list(model.parameters())
    v = state(5)
    assert_close(
        "jacobian",
        jacobian(lambda x: model(x, GRAPH), x, vectorize=True),
        jacobian(lambda x: model(x, GRAPH), x),
        tolerance=1e-11,
    )
    rows = [torch.autograd.grad(model(x, GRAPH), own, each) for each in v]
    want = torch.cat([torch.stack(of).flatten() for of in zip(*rows, strict=True)])
    got = torch.autograd.grad(model(x, GRAPH), own, v, is_grads_batched=True)
    assert_close("batch", torch.cat([g.flatten() for g in got]), want, tolerance=1e-11)
    if name == "regularizers":
        return  # torch's own backward of an output that is not used meets the map
    y = model(x, GRAPH)
    pull = partial(torch.autograd.grad, y, own, retain_graph=True)
    got = vmap(pull)(v)
    assert_close("vmap", torch.cat([g.flatten() for g in got]), want, tolerance=1e-11)


@pytest.mark.parametrize("place", ["ends", "field", "sparse"])
def test_batches_of_gradients_through_dropout(place):
    """Steps that run again draw what they drew, within a batch too."""
    x = state()
    model = GRAND(D, 4, 2, heads=2, dropout=0.4, input_dropout=0.2, encoder_channels=5).double()
    if place == "field":
        model.field.query = nn.Sequential(nn.Dropout(0.5), model.field.query)
    given = x.to_sparse_csr() if place == "sparse" else x
    own, v = list(model.parameters()), torch.randn(4, N, 2, dtype=torch.float64)

    def run():
        torch.manual_seed(5)
        return model(given, GRAPH)

    rows = [torch.autograd.grad(run(), own, each) for each in v]
    want = torch.cat([torch.stack(of).flatten() for of in zip(*rows, strict=True)])
    got = torch.autograd.grad(run(), own, v, is_grads_batched=True)
    assert_close("batch", torch.cat([g.flatten() for g in got]), want, tolerance=1e-11)


@pytest.mark.parametrize("options", [{}, {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}],
                         ids=["rk4", "dopri5"])  # fmt: skip
def test_hessians(options):
    model, x = conv(options | {"adjoint": "direct"}), state()

    def loss(x):
        return model(x, GRAPH).square().sum()

    want = hessian(loss, x)
    assert_close("vectorised", hessian(loss, x, vectorize=True), want, tolerance=1e-10)
    assert_close("torch.func", torch.func.hessian(loss)(x), want, tolerance=1e-10)


@pytest.mark.parametrize("options", [{}, {"variant": "l"}, {"method": "implicit_adams"}],
                         ids=["rk4", "l", "implicit_adams"])  # fmt: skip
def test_vmap_over_states_and_over_models(options):
    models = [conv(options) for _ in range(3)]
    x = state(3)
    got = vmap(lambda x: models[0](x, GRAPH))(x)
    assert_close("states", got, torch.stack([models[0](each, GRAPH) for each in x]))
    parameters, _ = stack_module_state(models)
    got = vmap(lambda p: functional_call(models[0], p, (x[0], GRAPH)))(parameters)
    assert_close("models", got, torch.stack([model(x[0], GRAPH) for model in models]))
    got = vmap(grad(partial(loss_of, models[0])), in_dims=(0, None))(parameters, x[0])
    for i, model in enumerate(models):
        compare_gradients({name: g[i] for name, g in got.items()}, model, x[0])


def test_an_ensemble_on_sparse_features():
    models = [GRAND(D, 4, 2, heads=2).double() for _ in range(3)]
    parameters, _ = stack_module_state(models)
    x = state().to_sparse_csr()
    got = vmap(grad(partial(loss_of, models[0], x=x)))(parameters)
    for i, model in enumerate(models):
        compare_gradients({name: g[i] for name, g in got.items()}, model, x)
    own = dict(models[0].named_parameters())
    v = {name: torch.randn_like(p) for name, p in own.items()}
    _, tangent = jvp(lambda p: loss_of(models[0], p, x), (own,), (v,))
    slopes = grad(lambda p: loss_of(models[0], p, x))(own)
    want = sum((slopes[name] * v[name]).sum() for name in own)
    assert_close("jvp", tangent, want, tolerance=1e-10)


REFUSED = {
    "continuous": "`adjoint` must be 'auto', 'direct' or 'checkpoint' under torch.func",
    "memory_limit": "`memory_limit` must be None under torch.func and forward mode, got 1000000",
    "regularizers": "`regularizers` must be kinetic alone .*, got directional",
    "semi_implicit_euler": "`method` must take any f, .*, got semi_implicit_euler",
    "uniformisation": "`method` must take any f, as rk4 and dopri5 do, .*, got uniformisation",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_values_is_refused(name):
    model, x = conv(OTHER_SOLVES[name]), state()
    for transform in (grad, partial(jvp, primals=(x,), tangents=(x,)), jacrev):
        with pytest.raises(NotImplementedError, match=f"^integrate: {REFUSED[name]}"):
            found = transform(lambda x: model(x, GRAPH).sum())
            found(x)


def test_steps_that_adapt_to_each_of_a_batch_are_refused():
    model, x = conv({"method": "dopri5"}), state(2)
    text = "^integrate: `method` must have fixed steps, as rk4 has, where torch.func.vmap maps .*"
    with pytest.raises(NotImplementedError, match=text):
        vmap(lambda x: model(x, GRAPH))(x)
    parameters = {name: torch.stack([p, p]) for name, p in model.named_parameters()}
    with pytest.raises(NotImplementedError, match=text + "got dopri5"):
        vmap(lambda p: functional_call(model, p, (x[0], GRAPH)))(parameters)
    got = vmap(lambda c: c * model(x[0], GRAPH))(torch.ones(2, dtype=torch.float64))
    assert_close("not mapped", got[0], model(x[0], GRAPH))


def test_penalties_within_a_transform():
    model, x = conv({"regularizers": ["kinetic"]}), state()

    def loss(x):
        return model(x, GRAPH).sum() + model.penalties["kinetic"].sum()

    got = grad(loss)(x)
    assert_close("gradient", got, jacobian(loss, x), tolerance=1e-11)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun", "explicit_adams"])
def test_integrate_itself(method):
    x = torch.rand(3, dtype=torch.float64)

    def solve(x):
        return gf.integrate(lambda t, x: -x * x, x, 1.0, method=method, rtol=1e-2, atol=1e-2).x

    assert_close("jacobian", jacrev(solve)(x), jacobian(solve, x), tolerance=1e-11)
