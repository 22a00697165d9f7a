"""A solve and an attention are given whole, by keyword, or both."""

import copy
import inspect
import pickle
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch

import grand_fast as gf
from grand_fast.nn import GRAND, Attention, AttentionDiffusion, GRANDConv
from grand_fast.testing import random_graph

SOLVE = gf.Solve(T=2.0, method="rk4", step_size=0.5)
ATTENTION = Attention(heads=2, attention_channels=6, normalizer="squareplus")


def decay(t, x):
    return -x


@pytest.fixture
def x():
    return torch.randn(random_graph("hub").num_nodes, 4)


def logits(model, x):
    with torch.no_grad():
        return model(x, random_graph("hub"))


def build(make, *sizes, **options):
    torch.manual_seed(0)
    return make(*sizes, **options)


@pytest.mark.parametrize(("make", "sizes"), [(GRAND, (4, 6, 3)), (GRANDConv, (4,))])
def test_whole_and_by_keyword_are_the_same(make, sizes, x):
    one = build(make, *sizes, solve=SOLVE, attention=ATTENTION)
    other = build(make, *sizes, T=2.0, step_size=0.5, heads=2, attention_channels=6,
                  normalizer="squareplus")  # fmt: skip
    mixed = build(make, *sizes, solve=gf.Solve(T=9.0, step_size=0.5), T=2.0, heads=2,
                  attention=Attention(attention_channels=6, normalizer="squareplus"))  # fmt: skip
    assert one.solve == other.solve == mixed.solve == SOLVE
    assert one.field.options == other.field.options == mixed.field.options
    want = logits(one, x)
    assert torch.equal(logits(other, x), want) and torch.equal(logits(mixed, x), want)
    assert one.stats.accepted == 4


def test_a_layer_of_attention(x):
    one = build(AttentionDiffusion, 4, attention=ATTENTION, alpha=0.5)
    for other in (
        build(AttentionDiffusion, 4, 6, 2, normalizer="squareplus", alpha=0.5),
        build(AttentionDiffusion, 4, attention_channels=6, heads=2, normalizer="squareplus",
              alpha=0.5),
        build(AttentionDiffusion, 4, 6, attention=Attention(heads=2), normalizer="squareplus",
              alpha=0.5),
    ):  # fmt: skip
        assert one.options == other.options
        assert torch.equal(one(x, random_graph("hub")), other(x, random_graph("hub")))
    assert (one.heads, one.attention_channels, one.normalizer) == (2, 6, "squareplus")


def test_attention_channels_by_default():
    assert AttentionDiffusion(5).attention_channels == 5
    assert GRAND(4, 6, 3, augment=2).field.attention_channels == 6
    assert GRANDConv(5).field.attention_channels == 5


def test_an_edge_weight_of_a_layer_counts_whatever_its_attention():
    assert GRANDConv(4, attention=Attention(reweight=False)).field.reweight
    with pytest.raises(TypeError, match="^GRANDConv: `reweight` is not an option"):
        GRANDConv(4, reweight=True)


def test_integrate():
    x0 = torch.ones(3, dtype=torch.float64)
    want = gf.integrate(decay, x0, 2.0, step_size=0.5).x
    assert torch.equal(gf.integrate(decay, x0, solve=SOLVE).x, want)
    assert torch.equal(gf.integrate(decay, x0, T=2.0, solve=gf.Solve(step_size=0.5)).x, want)
    mixed = gf.integrate(decay, x0, 2.0, solve=gf.Solve(T=7.0), step_size=0.5)
    assert torch.equal(mixed.x, want) and mixed.t == 2.0
    # By keyword one step is the default, as it was; a whole solve has steps of 1
    assert gf.integrate(decay, x0, 3.0).stats.accepted == 1
    assert gf.integrate(decay, x0, 3.0, solve=gf.Solve()).stats.accepted == 3


def test_the_continuous_adjoint_by_either_form():
    x0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    found = []
    for options in (
        {"adjoint_options": gf.solvers.ContinuousOptions(method="bosh3", tol_scale=1e3, params=())},
        {"adjoint_options": gf.solvers.ContinuousOptions(method="dopri5", params=())},
    ):
        x = gf.integrate(decay, x0, solve=SOLVE, adjoint="continuous", **options).x
        found.append(torch.autograd.grad(x.sum(), x0)[0])
    assert not torch.equal(*found)
    solve = gf.Solve(adjoint_method="bosh3", tol_scale_adjoint=1e3)
    assert solve.continuous() == gf.solvers.ContinuousOptions(method="bosh3", tol_scale=1e3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: GRAND(4, 6, 3, stepsize=1), "GRAND: `stepsize` is not an option. Did you mean `s"),
        (lambda: GRAND(4, 6, 3, drop_out=0.1), "GRAND: `drop_out` .* Did you mean `dropout`?"),
        (lambda: GRAND(4, 6, 3, head=1), "GRAND: `head` is not an option. Did you mean `heads`?"),
        (lambda: GRANDConv(4, max_nfes=5), "GRANDConv: `max_nfes` .* Did you mean `max_nfe`?"),
        (lambda: AttentionDiffusion(4, T=1.0), "AttentionDiffusion: `T` .* The options are chann"),
        (lambda: gf.integrate(decay, torch.ones(2), 1.0, tol=1), "integrate: `tol` is not an opt"),
        (lambda: gf.integrate(decay, torch.ones(2)), "integrate: `T` must be given, by itself or"),
        (lambda: GRAND(4, 6, 3, solve={"T": 1.0}), r"GRAND: `solve` must be Solve\(…\), got dict"),
        (lambda: GRAND(4, 6, 3, attention=2), r"GRAND: `attention` must be Attention\(…\), got in"),
        (lambda: gf.integrate(decay, torch.ones(2), solve=ATTENTION), "`solve` must be Solve"),
        (lambda: gf.Solve(2.0), "positional"),
    ],
)
def test_what_is_no_option_is_named(call, text):
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"solve": gf.Solve(adjoint="direct"), "memory_limit": 10**6}, "`memory_limit` must come "),
        ({"solve": gf.Solve(tol_scale=2.0), "method": "dopri5", "rtol": 0.1}, "`tol_scale` must"),
    ],
)
def test_options_of_both_forms_that_conflict(options, text, x):
    with pytest.raises(ValueError, match=text):
        GRAND(4, 6, 3, **options)(x, random_graph("hub"))


def test_fields_are_attributes_of_the_model(x):
    model = build(GRAND, 4, 6, 3, solve=SOLVE, attention=ATTENTION)
    for field in fields(gf.Solve):
        assert getattr(model, field.name) == getattr(SOLVE, field.name)
    model.step_size, model.T = 1.0, 3.0
    assert model.solve == gf.Solve(T=3.0, step_size=1.0) and SOLVE.step_size == 0.5
    logits(model, x)
    assert model.stats.accepted == 3
    model.field.normalizer = "softmax"
    assert torch.equal(logits(model, x), logits(
        build(GRAND, 4, 6, 3, solve=model.solve, heads=2, attention_channels=6), x))  # fmt: skip
    with pytest.raises(FrozenInstanceError):
        model.solve.T = 1.0


def test_regularizers_are_integrated_while_training_alone(x):
    model = build(GRAND, 4, 6, 3, solve=gf.Solve(regularizers=("kinetic",)))
    model(x, random_graph("hub"))
    assert set(model.penalties) == {"kinetic"}
    model.eval()(x, random_graph("hub"))
    assert model.penalties == {} and model.regularizers == ("kinetic",)


@pytest.mark.parametrize("move", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(move, x):
    model = build(GRAND, 4, 6, 3, solve=SOLVE, attention=ATTENTION)
    moved = move(model)
    assert moved.solve == SOLVE and moved.field.options == model.field.options
    assert torch.equal(logits(moved, x), logits(model, x))
    moved.T = 1.0
    assert model.T == 2.0


@pytest.mark.parametrize("form", ["whole", "keyword"])
def test_one_program_of_either_form(form):
    def solved(x0):
        if form == "whole":
            return gf.integrate(decay, x0, solve=SOLVE).x
        return gf.integrate(decay, x0, 2.0, step_size=0.5).x

    x0 = torch.ones(3)
    program = torch.compile(solved, fullgraph=True, backend="eager")
    assert torch.equal(program(x0), solved(x0))


@pytest.mark.parametrize("taker", [gf.integrate, GRAND, GRANDConv])
def test_the_signature_lists_the_options(taker):
    parameters = inspect.signature(taker).parameters
    assert {field.name for field in fields(gf.Solve)} <= set(parameters)
    assert parameters["step_size"].default == (None if taker is gf.integrate else 1.0)
    assert "options" not in parameters
    assert "{Solve" not in taker.__doc__ and "{Attention" not in taker.__doc__


@pytest.mark.parametrize("name", ["max_nfe", "memory_limit"])
def test_an_option_is_declared_once(name):
    """Where it is declared, and where it is obeyed; those who pass it on take it whole."""
    root = Path(gf.__file__).parent
    mentions = [p for p in root.rglob("*.py") if re.search(rf"\b{name}\b", p.read_text())]
    assert root / "solvers" / "solve.py" in mentions and len(mentions) <= 4
