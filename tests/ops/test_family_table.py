"""The tables of `kernels/README.md`, section "The family": each cell is what really happens."""

import inspect
import itertools
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grand_fast as gf
from grand_fast.kernels.weighting import AttentionGradients
from grand_fast.ops import backends
from grand_fast.ops.scores import SCORES
from grand_fast.testing import random_graph
from tests._pairwise import covering

README = Path(__file__).parents[2] / "kernels" / "README.md"
LAUNCHERS = {
    "attention_diffusion": ("attention_diffusion_fwd", "attention_diffusion_bwd"),
    "edge_attention": ("edge_attention_fwd", "edge_attention_bwd", "edge_attention_top"),
}
CHOICES = {
    "`normalizer`": ("softmax", "squareplus"),
    "`normalize`": ("receiver", "sender"),
    "`edge_weight`": ("no", "yes"),
    "source": ("no", "yes"),
}
EDGES = 45
INPUTS = ("x", "q", "k", "alpha", "edge_weight", "top")
import_module = backends._import
unsupported_reasons = backends.unsupported_reasons.__wrapped__


def tables():
    """Of each table its rows, as dictionaries from the heads of the columns; and the reasons."""
    section = README.read_text().split("## The family\n")[1].split("\nShared code:")[0]
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", section, re.M):
        lines = [[c.strip() for c in line.strip("|\n ").split("|")] for line in block.splitlines()]
        found.append([dict(zip(lines[0], row, strict=True)) for row in lines[2:]])
    return found, dict(re.findall(r'^(\d)\. "(.*?)"', section, re.M))


(PREPARED, OUTCOMES), REASONS = tables()
COLUMNS = [head for head in OUTCOMES[0] if ": " in head]


def score_of(row):
    return row["`score`"].split("`")[1]


def combinations(row, strength=4):
    """Score, d_k and the other choices, for every combination of what the cells of a row list.

    With a lower `strength`: for some, which show every combination of so many choices.
    """
    _, _, condition = row["`score`"].partition(", d_k = ")
    d_k = {"": 4, "1": 1, "2 or more": 2}[condition]
    listed = [row[head].split(", ") for head in CHOICES]
    for choice in covering([len(values) for values in listed], strength):
        yield score_of(row), d_k, *(v[i] for v, i in zip(listed, choice, strict=True))


def cells(verdict):
    """The cells of one verdict, `"fused"`, `"fallback"` or `"refused"`, each once per dtype."""
    found = []
    for row, column in itertools.product(OUTCOMES, COLUMNS):
        got, _, reason = row[column].partition(" (")
        backend, dtypes = column.split(": ")
        assert got in ("fused", "fallback", "refused")
        assert (got == "fused") == (not reason)
        for name in dtypes.split(", ") if got == verdict else ():
            case = (row, backend, getattr(torch, name), REASONS.get(reason.strip(")")))
            label = row["`score`"].replace("`", "").replace(", ", " ")
            found.append(pytest.param(*case, id=f"{label}-{backend}-{name}"))
    return pytest.mark.parametrize(("row", "backend", "dtype", "reason"), found)


def test_every_combination_is_listed_once():
    listed = sorted(c for row in OUTCOMES for c in combinations(row))
    heads = [("gat", 1), ("gat", 2)] + [(name, 4) for name in SCORES if name != "gat"]
    assert listed == sorted((*h, *c) for h in heads for c in itertools.product(*CHOICES.values()))
    for backend in ("gpu", "cpu"):
        named = [head.split(": ")[1].split(", ") for head in COLUMNS if head.startswith(backend)]
        assert sorted(sum(named, [])) == ["bfloat16", "float16", "float32", "float64"]


def test_every_score_is_listed_once():
    assert [score_of(row) for row in PREPARED] == list(SCORES)


@pytest.mark.parametrize("row", PREPARED, ids=score_of)
def test_what_kernels_see_of_a_score(row):
    score = SCORES[score_of(row)]
    d_k = 1 if score.name == "gat" else 3
    more = row["columns of q', k'"].removeprefix("d_k").removeprefix(" + ")
    q, k = score.prepare(*torch.randn(2, 4, 2, d_k))
    assert q.shape == k.shape == (4, 2, d_k + int(more or 0))
    assert score.weighting(d_k).function == row["φ(u)"]


def stand_in(op, launcher):
    """A launcher that takes the arguments of the CPU's, and answers in shape and type."""
    signature = inspect.signature(getattr(import_module(f"grand_fast.kernels.{op}.cpu"), launcher))

    def launch(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        if launcher.endswith("_bwd"):
            inputs = {f"d{name}": given.get(name) for name in INPUTS}
            return AttentionGradients(**{k: t if t is None else t * 0 for k, t in inputs.items()})
        q = given["q"]
        per_row = torch.zeros(q.shape[:2])
        if launcher.endswith("_top"):
            return per_row
        return given["x"] * 0 if "x" in given else q.new_zeros(EDGES, q.shape[1]), per_row

    return launch


@pytest.fixture
def calls(monkeypatch):
    """`(backend, launcher)` of every call; the operators believe in a GPU that takes any tensor."""
    log = []

    def recorder(launch, backend, launcher):
        def recorded(*args, **kwargs):
            log.append((backend, launcher))
            return launch(*args, **kwargs)

        return recorded

    def recording(name):
        op, backend = name.split(".")[-2:]
        if backend == "pieces":
            return SimpleNamespace(plan=None)
        module = import_module(name)
        if op not in LAUNCHERS and backend != "dense":
            return module
        launchers = dict(inspect.getmembers(module, inspect.isfunction))
        if backend == "dense":
            launchers["Projection"] = module.Projection
        if backend == "gpu":
            launchers = {name: stand_in(op, name) for name in LAUNCHERS[op]}
        recorders = {name: recorder(launch, backend, name) for name, launch in launchers.items()}
        return SimpleNamespace(**recorders)

    def reasons(name, device, dtype):
        return [] if name == "gpu" else unsupported_reasons(name, device, dtype)

    monkeypatch.setattr(backends, "_import", recording)
    monkeypatch.setattr(backends, "unsupported_reasons", reasons)
    return log


def each_call(row, dtype, backend):
    """Both operators, forward and backward, for every pair of choices of a row."""
    graph = random_graph("random", 9)
    assert graph.num_edges == EDGES
    n = graph.num_nodes
    for score, d_k, normalizer, normalize, weights, source in combinations(row, 2):
        leaves = {"q": (n, 3, d_k), "k": (n, 3, d_k)}
        if weights == "yes":
            leaves["edge_weight"] = (graph.num_edges,)
        of_state = {"x": (n, 5)} | ({"x0": (n, 5), "beta": (5,)} if source == "yes" else {})
        for op, shapes in (("edge_attention", leaves), ("attention_diffusion", of_state | leaves)):

            def call(op=op, shapes=shapes, score=score, choice=(normalizer, normalize)):
                tensors = {
                    name: torch.randn(shape, dtype=dtype, requires_grad=True)
                    for name, shape in shapes.items()
                }
                options = dict(zip(("normalizer", "normalize"), choice, strict=True))
                function = getattr(gf.ops, op)
                out = function(graph=graph, score=score, backend=backend, **tensors, **options)
                torch.autograd.grad(out.sum(), list(tensors.values()))

            yield op, normalizer, call


@cells("fused")
def test_fused(row, backend, dtype, reason, calls):
    assert dtype in backends._DTYPES[backend]
    for op, normalizer, call in each_call(row, dtype, backend):
        calls.clear()
        call()
        want = [f"{op}_fwd", f"{op}_bwd"]
        if normalizer == "squareplus":
            want.insert(0, "edge_attention_top")
        # `column_dots` adds up dbeta, whatever the operator
        passes = [c for c in calls if c != ("dense", "column_dots")]
        assert passes == [(backend, launcher) for launcher in want]


@cells("fallback")
def test_fallback(row, backend, dtype, reason, calls, monkeypatch, caplog):
    device = torch.device("cuda" if backend == "gpu" else "cpu")
    (of_dtype,) = [r for r in unsupported_reasons(backend, device, dtype) if r.startswith("dtype")]
    monkeypatch.setattr(backends, "unsupported_reasons", lambda *question: [of_dtype])
    for op, _, call in each_call(row, dtype, backend):
        with pytest.raises(RuntimeError, match=f"^{op}: .*{re.escape(reason)}"):
            call()
    assert not calls
    backends._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="grand_fast"):
        for _, _, call in each_call(row, dtype, "auto"):
            call()
    assert {name for name, _ in calls} == {"reference"}
    assert caplog.text.count(reason) == len(LAUNCHERS)


@cells("refused")
def test_refused(row, backend, dtype, reason, calls):
    for op, _, call in each_call(row, dtype, backend):
        with pytest.raises(ValueError, match=f"^{op}: .*{re.escape(reason)}"):
            call()
    assert not calls


@pytest.mark.parametrize("row", OUTCOMES[:-1], ids=score_of)
def test_projections_are_part_of_the_operator(row, calls):
    graph, x = random_graph("random", 9), torch.randn(9, 5, requires_grad=True)
    for score, d_k, normalizer, normalize, weights, source in combinations(row):
        if source == "yes":
            continue
        calls.clear()
        weight, bias = torch.randn(6 * d_k, 5), torch.randn(6 * d_k)
        f = gf.ops.projected_attention_diffusion(
            x, weight, bias, graph, heads=3, score=score, normalizer=normalizer,
            normalize=normalize, edge_weight=torch.ones(EDGES) if weights == "yes" else None,
        )  # fmt: skip
        torch.autograd.grad(f.sum(), x)
        assert "dense" in {backend for backend, _ in calls}
        assert {"attention_diffusion_fwd", "attention_diffusion_bwd"} <= {c[1] for c in calls}


@pytest.mark.parametrize("op", LAUNCHERS)
def test_launchers_of_the_gpu_take_the_arguments_of_the_cpu(op):
    """So they can be called as `test_fused` saw; `tests/gpu` runs them."""
    pytest.importorskip("triton")
    gpu, cpu = (import_module(f"grand_fast.kernels.{op}.{name}") for name in ("gpu", "cpu"))
    for launcher in LAUNCHERS[op]:
        arguments = [inspect.signature(getattr(m, launcher)).parameters for m in (gpu, cpu)]
        assert list(arguments[0]) == list(arguments[1])
