"""Fields of GRAND and of those that came after it: the same states, gradients and evaluations."""

import warnings

import pytest
import torch

import grand_fast as gf
from grand_fast.testing import assert_close
from tests.compat import _released
from tests.compat._released import F64, OPT, D, N, edges, gradients

X = torch.linspace(-1, 1, N * D, dtype=F64).sin().view(N, D)
SPMM, LAYER = "torch_sparse.spmm", "SpGraphTransAttentionLayer"
FUSED = f"{SPMM}, one pass with the attention"
FIELDS = {
    "GRAND-nl": (_released.Field, False, {LAYER, FUSED}),
    "GRAND-l": (_released.Field, True, {LAYER, FUSED, SPMM}),
    "GREAD": (_released.Gread, False, {LAYER, FUSED}),
    "GREAD, linear": (_released.Gread, True, {LAYER, FUSED, SPMM}),
    "GraphCON": (_released.GraphCon, False, {LAYER, FUSED}),
    "FROND": (_released.Frond, False, {LAYER, SPMM}),
    "ACMP": (_released.Acmp, True, {LAYER, SPMM}),
    "a product a head": (_released.PerHead, False, {LAYER, FUSED, SPMM}),
}


def both(make, *, tolerance=1e-9, **options):
    """Stock and patched: what `gradients` finds, the evaluations of the field; and the report.

    tolerance: on gradients.
    """
    results = []
    for is_ours in (False, True):
        torch.manual_seed(3)
        patch = gf.compat.patch(**options) if is_ours else None
        model = make()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = gradients(model, X)
        said = {str(w.message) for w in heard if "Unexpected" in str(w.message)}
        results.append((found, model.odefunc.nfe, said))
        if patch is not None:
            patch.remove()
    (theirs, nfe, said), (ours, our_nfe, we_said) = results
    assert nfe == our_nfe > 6 and said == we_said
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        floor = torch.ones(1, dtype=F64)
        a, b = torch.cat([a.flatten(), floor]), torch.cat([b.flatten(), floor])
        assert_close(str(i), a, b, tolerance=tolerance if i else 1e-9)
    return patch.report, said


CASES = [(name, solver) for name in FIELDS for solver in ("theirs", "odeint_adjoint")]
CASES += [(name, "odeint") for name in ("GRAND-nl", "GRAND-l", "GraphCON")]


@pytest.mark.parametrize(("name", "solver"), CASES)
def test_a_model_is_as_it_was(name, solver):
    field, linear, used = FIELDS[name]
    opt = OPT | {"adjoint": solver == "odeint_adjoint"}

    def make():
        return _released.Block(field(opt, edges()), opt, linear).double()

    # torchdiffeq's gradient goes through its choice of the first step, too: as small as the error
    tolerance = 1e-4 if solver == "odeint" else 1e-9
    report, said = both(make, solver=None if solver == "theirs" else "same", tolerance=tolerance)
    further = set() if solver == "theirs" else {f"torchdiffeq.{solver}"}
    assert report.used.keys() == used | further and not report.left
    assert said == {"Dopri5Solver: Unexpected arguments {'step_size': 1}"}


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "dopri8", "dopri8, adjoint"])
def test_methods(method):
    method, _, adjoint = method.partition(", ")
    opt = OPT | {"method": method, "step_size": 0.25, "adjoint": bool(adjoint)}

    def make():
        return _released.Block(_released.Field(opt, edges()), opt).double()

    report, _ = both(make)
    name = "torchdiffeq.odeint_adjoint" if adjoint else "torchdiffeq.odeint"
    reason = "method 'dopri8' is torchdiffeq's own"
    assert report.left == ({(name, reason): 1} if method == "dopri8" else {})


def test_the_limit_of_evaluations_is_the_users_own():
    opt = OPT | {"max_nfe": 20}
    with gf.compat.patch():
        model = _released.Block(_released.Field(opt, edges()), opt).double()
        with pytest.raises(_released.MaxNFEError):
            model(X * 30)
    assert model.odefunc.nfe == 21


def test_a_training_is_the_same():
    def train():
        torch.manual_seed(0)
        model = _released.Block(_released.Field(OPT, edges()), OPT, linear=True).double()
        optimizer = torch.optim.Adamax(model.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            loss = (model(X) - X.cos()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                losses += [loss.item(), model.eval()(X).sum().item()]
            model.train()
        return torch.tensor(losses, dtype=F64)

    theirs = train()
    with gf.compat.patch():
        assert_close("losses", train(), theirs, tolerance=1e-6)  # steps of 1e-4


def test_events_are_torchdiffeqs():
    import torchdiffeq

    t, x = torch.zeros((), dtype=F64), torch.ones(1, dtype=F64)
    with gf.compat.patch() as patch:
        found, _ = torchdiffeq.odeint_event(
            lambda t, x: -x,
            x,
            t,
            event_fn=lambda t, x: x[0] - 0.5,
            odeint_interface=torchdiffeq.odeint,
        )
    assert abs(float(found.detach()) - 0.6931) < 1e-3
    assert patch.report.left == {("torchdiffeq.odeint", "it looks for an event"): 1}


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_what_torchdiffeq_answers_is_reported_as_left(name):
    import torchdiffeq

    t, x = torch.tensor([0.0, 1.0], dtype=F64), torch.ones(1, dtype=F64)
    of_adjoint = {"adjoint_params": (), "adjoint_method": "dopri8"}
    cases = [
        ("`step_t` is given", x, t, {"options": {"step_t": t[1:] / 2}}),
        ("`perturb` is given", x, t, {"method": "rk4", "options": {"perturb": True}}),
        ("`t` requires a gradient", x, t.clone().requires_grad_(), {}),
        ("`y0` is complex", x + 0j, t, {}),
    ]
    if name == "odeint_adjoint":
        cases += [("adjoint_method 'dopri8' is torchdiffeq's own", x, t, of_adjoint)]
    for reason, y0, times, call in cases:
        call = {"adjoint_params": (), **call} if name == "odeint_adjoint" else call
        want = getattr(torchdiffeq, name)(lambda t, x: -x, y0, times, **call)
        with gf.compat.patch() as patch:
            got = getattr(torchdiffeq, name)(lambda t, x: -x, y0, times, **call)
        assert_close(
            "states", torch.view_as_real(got + 0j), torch.view_as_real(want + 0j), tolerance=1e-12
        )
        assert f"torchdiffeq.{name}" not in patch.report.used
        assert patch.report.left == {(f"torchdiffeq.{name}", reason): 1}
