"""torch.compile and torch.export: operators, a layer and a solve, against eager."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import grand_fast as gf
from grand_fast.testing import assert_close, random_graph

from ._calls import CALLS, gradients, tensors

GRAPH = random_graph("empty_rows", 12)


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()


def compare(compiled, eager, inputs):
    """Outputs and every gradient; the very kernels of eager mode run, in their order."""
    got, want = compiled(), eager()
    assert_close("output", got, want.double())
    for a, b in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close("gradient", a, b.double())


@pytest.mark.parametrize("given", ["argument", "closure"])
@pytest.mark.parametrize("name", CALLS)
def test_operators(name, given):
    call, t = CALLS[name], tensors(GRAPH)
    if given == "argument":
        function = torch.compile(call, fullgraph=True, backend="aot_eager")
        compare(lambda: function(GRAPH, **t), lambda: call(GRAPH, **t), t.values())
    else:
        function = torch.compile(lambda: call(GRAPH, **t), fullgraph=True, backend="aot_eager")
        compare(function, lambda: call(GRAPH, **t), t.values())


@pytest.mark.parametrize("options", [
    {"score": "cosine", "normalizer": "squareplus"},
    {"score": "exp_kernel", "normalize": "sender"},
], ids=["cosine", "exp_kernel"])  # fmt: skip
def test_scores(options):
    t = tensors(GRAPH)

    def call():
        q, k = t["q"], t["k"]
        return gf.ops.attention_diffusion(t["x"], q, k, GRAPH, **options, backend="reference")

    function = torch.compile(call, fullgraph=True, backend="aot_eager")
    compare(function, call, [t["x"], t["q"], t["k"]])


class OnGraph(nn.Module):
    """A layer or model with its graph as an attribute."""

    def __init__(self, model, graph):
        super().__init__()
        self.model, self.graph = model, graph

    def forward(self, x):
        return self.model(x, self.graph)


def models():
    # One step: other tests are about the solve
    options = {"heads": 2, "T": 1.0, "method": "euler", "step_size": 1.0, "adjoint": "direct"}
    return {
        "layer": gf.nn.AttentionDiffusion(5, 4, 2),
        "nl": gf.nn.GRAND(5, 4, 3, **options, source=True),
        "l": gf.nn.GRAND(5, 4, 3, **options, variant="l"),
        "mixed": gf.nn.GRAND(5, 4, 3, **options, variant="mixed"),
        "ends": gf.nn.GRAND(5, 4, 3, **options, mlp=True, batch_norm=True, augment=2, fc_out=True),
        "conv": gf.nn.GRANDConv(5, attention_channels=4, **options),
    }


@pytest.mark.parametrize("name", ["layer", "nl", "l", "mixed", "ends", "conv"])
def test_models(name):
    model, x = models()[name], tensors(GRAPH)["x"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = [x, *model.parameters()]
    compare(lambda: compiled(x, GRAPH), lambda: model(x, GRAPH), inputs)


def solve(method, adjoint="checkpoint", **options):
    options = {"T": 0.5, "step_size": 0.25, "source": True} | options
    return gf.nn.GRAND(5, 4, 3, heads=2, method=method, adjoint=adjoint, **options)


def check_solve(method, adjoint, T=0.5):
    """Against eager; and the elements that the compiled solve keeps for its backward."""
    model, x = solve(method, adjoint, T=T), tensors(GRAPH)["x"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compare(lambda: compiled(x, GRAPH), lambda: model(x, GRAPH), [x, *model.parameters()])
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        compiled(x, GRAPH)
    stats = model.stats
    model(x, GRAPH)
    assert stats == model.stats and model.status is gf.Status.SUCCESS and model.t == T
    return sum(saved.values())


def test_a_solve_with_fixed_steps_checkpointed_keeps_one_state_a_step():
    kept = {}
    for adjoint in ("direct", "checkpoint"):
        torch._dynamo.reset()
        kept[adjoint] = check_solve("rk4", adjoint)
    steps, size = 2, 12 * 4
    assert kept["direct"] - kept["checkpoint"] > 3 * steps * size


@pytest.mark.parametrize(
    ("method", "adjoint", "T"),
    [("euler", "direct", 0.5), ("explicit_adams", "checkpoint", 1.25)],  # past its first steps
)
def test_solves_with_fixed_steps(method, adjoint, T):
    check_solve(method, adjoint, T)


DATA_DEPENDENT = {
    "adaptive": (("dopri5",), {}, "`method` must be one of euler, .*, got dopri5"),
    "implicit": (("semi_implicit_euler", "direct"), {}, "`method` must be one of euler"),
    "continuous": (("rk4", "continuous"), {}, "`adjoint` must be one of auto, direct, checkpoint"),
    "limited": (("rk4",), {"memory_limit": 10**6}, "`memory_limit` must be"),
    "thinned": (("rk4",), {"variant": "nl-rw", "attention_threshold": 0.2},
                "`attention_threshold` and `attention_quantile` must be None"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA_DEPENDENT)
def test_solves_that_go_by_values_break_the_program_and_say_why(case):
    arguments, options, text = DATA_DEPENDENT[case]
    model, x = solve(*arguments, **options), tensors(GRAPH)["x"]
    with pytest.raises(NotImplementedError, match=text):
        torch.export.export(model, (x.detach(), GRAPH))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=text):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x, GRAPH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [("adaptive_heun", {"rtol": 0.1, "atol": 0.1}),
     ("euler", {"variant": "nl-rw", "attention_threshold": 0.2})],
    ids=["adaptive", "thinned"],
)  # fmt: skip
def test_solves_that_go_by_values_are_compiled_in_pieces(method, options):
    model, x = solve(method, **options), tensors(GRAPH)["x"]
    compiled = torch.compile(model, backend="aot_eager")
    compare(lambda: compiled(x, GRAPH), lambda: model(x, GRAPH), [x, *model.parameters()])


@pytest.mark.slow
def test_inductor():
    model, x = solve("euler"), tensors(GRAPH)["x"]
    compiled = torch.compile(OnGraph(model, GRAPH), fullgraph=True)
    compare(lambda: compiled(x), lambda: model(x, GRAPH), [x, *model.parameters()])


def test_one_compilation_for_a_graph():
    counter = torch._dynamo.testing.CompileCounter()
    layer, t = gf.nn.AttentionDiffusion(5, 4, 2), tensors(GRAPH)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        compiled(t["x"], GRAPH)
        layer(t["x"], GRAPH)  # plans the graph, which is no reason to compile again
    assert counter.frame_count == 1


def test_the_backend_is_chosen_where_the_program_runs(monkeypatch):
    t = tensors(GRAPH)
    function = torch.compile(CALLS["bare"], fullgraph=True, backend="aot_eager")
    want = function(GRAPH, **t)
    reference = gf.kernels.attention_diffusion.reference
    real, calls = reference.attention_diffusion_fwd, []
    monkeypatch.setattr(
        reference, "attention_diffusion_fwd", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    with gf.backend("reference"):
        assert_close("f", function(GRAPH, **t), want.double())
    assert calls


LOADED = """
import sys, torch, grand_fast
from grand_fast.testing import random_graph
folder, graph = sys.argv[1], random_graph("empty_rows", 12)
x = torch.load(f"{folder}/x.pt")
by_argument = torch.export.load(f"{folder}/argument.pt2").module()(x, graph)
by_attribute = torch.export.load(f"{folder}/attribute.pt2").module()(x)
torch.save([by_argument, by_attribute], f"{folder}/out.pt")
"""


def test_an_exported_program_runs_elsewhere(tmp_path):
    """With its graph as an argument, states kept; and as an attribute, states recomputed."""
    x, wanted = tensors(GRAPH)["x"].detach(), []
    for adjoint, name in (("direct", "argument"), ("checkpoint", "attribute")):
        model = models()["nl"]
        model.adjoint = adjoint
        names = [n for n, _ in model.named_parameters()]
        of_graph = OnGraph(model, GRAPH)
        given, arguments = (model, (x, GRAPH)) if name == "argument" else (of_graph, (x,))
        exported = torch.export.export(given, arguments)
        program = exported.module()
        prefix = "" if name == "argument" else "model."
        theirs = dict(program.named_parameters())
        want = model(x, GRAPH)
        got = gradients(program(*arguments), [theirs[f"{prefix}{n}"] for n in names])
        for a, b in zip(got, gradients(want, model.parameters()), strict=True):
            assert_close("gradient", a, b.double())
        torch.export.save(exported, tmp_path / f"{name}.pt2")
        wanted.append(want)
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", LOADED, str(tmp_path)], check=True)
    for got, want in zip(torch.load(tmp_path / "out.pt", weights_only=False), wanted, strict=True):
        assert_close("output", got, want.double())


def test_labels_and_a_quantile_that_is_for_training_can_be_exported():
    x, labels = tensors(GRAPH)["x"].detach(), torch.eye(3)[torch.arange(12) % 3]
    model = solve("rk4", variant="nl-rw", attention_quantile=0.3, label_channels=3).eval()
    program = torch.export.export(model, (x, GRAPH, labels)).module()
    assert_close("logits", program(x, GRAPH, labels), model(x, GRAPH, labels).double())
