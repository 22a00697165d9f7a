"""Every kernel against float64, on awkward graphs, in all storage types, and twice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.core.harness import Budget
from bench.core.report import Report
from bench.core.tables import cell, print_rows
from bench.gpu.device import Cuda
from grand_fast import Graph, ops
from grand_fast.ops.scores import DIRECTIONS, NORMALIZERS, SCORES, AbstractScore
from grand_fast.testing import GRAPH_KINDS, assert_close, random_graph

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((128, 4, 32), (162, 2, 16), (5, 3, 7))  # d, H, d_k: wide, 64-bit and narrow loads
NODES = 60  # and 40 times as many edges in a hub: several pieces

Inputs = dict[str, Tensor]
Sizes = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Operator:
    """How an operator is called, and with what.

    shapes: by the letters n, e, d, h, k, p for 2·h·k, or 1. takes_heads: the call gets `heads` too.
    """

    name: str
    shapes: dict[str, str]
    call: Callable[..., Tensor]
    takes_heads: bool = False


def _stage(*, graph: Graph, backend: str, **y: Tensor) -> Tensor:
    terms = list(zip((1.0, -0.5, 2.0, 0.1), y.values(), strict=True))
    return ops.stage_update(terms, backend=backend)


def _projected(x: Tensor, weight: Tensor, bias: Tensor, **others: Any) -> Tensor:
    """With weights as a layer has them: of random ones, scores would be too large to compare."""
    scale = x.shape[1] ** -0.5
    return ops.projected_attention_diffusion(x, weight * scale, bias, **others)


def _error_ratio(*, graph: Graph, backend: str, **f: Tensor) -> Tensor:
    x, y, *slopes = f.values()
    terms = list(zip((0.5, -1.0, 0.25), slopes, strict=True))
    return ops.error_ratio(terms, x, y, rtol=1e-2, atol=1e-3, backend=backend)


_FIELD = {"x": "nd", "alpha": "d", "beta": "d", "x0": "nd"}
_PRODUCT = {"values": "nhd", "q": "nhk", "k": "nhk"}
_EDGES = {"edge_key": "ehk", "edge_value": "ehd"}
_PROJECTED = _FIELD | {"weight": "pd", "bias": "p"}
OPERATORS = (
    Operator("attention_diffusion", _FIELD | {"q": "nhk", "k": "nhk"}, ops.attention_diffusion),
    Operator("csr_diffusion", _FIELD | {"a": "e"}, ops.csr_diffusion),
    Operator("edge_attention", {"q": "nhk", "k": "nhk"}, ops.edge_attention),
    Operator("stage_update", {f"y{s}": "nd" for s in range(4)}, _stage),
    Operator("projected_attention_diffusion", _PROJECTED, _projected, takes_heads=True),
    Operator("projected_attention_diffusion, one head", _PROJECTED, partial(_projected, heads=1)),
    Operator("error_ratio", {name: "nd" for name in ("x", "y", "f0", "f1", "f2")}, _error_ratio),
    Operator("edge_softmax", {"scores": "eh"}, ops.edge_softmax),
    Operator("attention_product", _PRODUCT, ops.attention_product),
    Operator(
        "attention_product, edges", _PRODUCT | _EDGES, partial(ops.attention_product, reduce="cat")
    ),
    Operator("spmm", {"x": "nhk", "values": "eh"}, ops.spmm),
    Operator("spmm, shared x", {"x": "nd", "values": "eh"}, ops.spmm),
)


def _family() -> Iterator[Operator]:
    """Every score, normaliser and direction, by turns with weights on the edges and without."""
    scores: dict[str, str | AbstractScore] = {name: name for name in SCORES}
    scores["exp_kernel"] = ops.ExpKernel(1.5, 3.0)  # a bell that random vectors lie within
    every = product(enumerate(scores.items()), enumerate(NORMALIZERS), enumerate(DIRECTIONS))
    for (i, (name, score)), (j, normalizer), (m, normalize) in every:
        shapes = dict.fromkeys("qk", "nh1" if name == "gat" else "nhk")
        text = f"{name} {normalizer} {normalize}"
        if (i + j + m) % 2:
            shapes, text = shapes | {"edge_weight": "e"}, f"{text} weighted"
        options: dict[str, Any] = {"score": score, "normalizer": normalizer, "normalize": normalize}
        attention = partial(ops.edge_attention, mean_heads=m == j, **options)
        yield Operator(f"edge_attention {text}", shapes, attention)
        diffusion = partial(ops.attention_diffusion, **options)
        yield Operator(f"attention_diffusion {text}", {"x": "nd"} | shapes, diffusion)


FAMILY = tuple(_family())


def check_family(device: Cuda, report: Report, budget: Budget, **small: Any) -> None:
    """`check_kernels` of every weighting in float32, and of some in half types."""
    few = {"kinds": ("hub",), "sizes": ((64, 4, 16),)} | small
    some = {torch.float32: FAMILY, torch.bfloat16: FAMILY[::5], torch.float16: FAMILY[2::5]}
    for dtype, operators in some.items():
        check_kernels(device, report, budget, operators=operators, dtypes=(dtype,), **few)


def check_kernels(
    device: Cuda,
    report: Report,
    budget: Budget,
    *,
    kinds: tuple[str, ...] = GRAPH_KINDS,
    sizes: Sizes = SIZES,
    operators: tuple[Operator, ...] = OPERATORS,
    nodes: int = NODES,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Compare, print a table, and note in `report.failed` what disagrees."""
    rows = []
    for operator in operators:
        report.say(f"{operator.name}: check")
        row = {"op": operator.name, "check": "float64", "cases": 0, "failed": 0}
        for name, graph, heads, inputs in _cases(operator, kinds, sizes, nodes, dtypes):
            if not budget.allows(f"check of {operator.name} on {name}"):
                continue
            row["cases"] += 1
            try:
                options = {"heads": heads} if operator.takes_heads else {}
                _compare(partial(operator.call, **options), graph, inputs, device)
            except (AssertionError, RuntimeError) as problem:
                row["failed"] += 1
                report.failed.append(f"{operator.name} on {name}: {problem}")
        rows.append(row)
    report.rows += rows
    report.done()
    title = "output and every gradient against float64, and two runs bit for bit"
    columns = [("", cell("op")), ("cases", cell("cases")), ("failed", cell("failed"))]
    print_rows(f"{title}, {len(kinds)} kinds of graphs", rows, columns)


def _cases(
    operator: Operator, kinds: tuple[str, ...], sizes: Sizes, nodes: int,
    dtypes: tuple[torch.dtype, ...],
) -> Iterator[tuple[str, Graph, int, Inputs]]:  # fmt: skip
    for i, kind in enumerate(kinds):
        graph = random_graph(kind, nodes)  # type: ignore[arg-type]
        for d, h, k in sizes if kind == "hub" else sizes[i % len(sizes) :][:1]:
            letters = {"n": graph.num_nodes, "e": graph.num_edges, "d": d, "h": h, "k": k,
                       "p": 2 * h * k, "1": 1}  # fmt: skip
            g = torch.Generator().manual_seed(i)
            shapes = {name: [letters[c] for c in text] for name, text in operator.shapes.items()}
            inputs = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
            for dtype in dtypes:
                case = f"{kind}, d={d} H={h} d_k={k} {str(dtype).removeprefix('torch.')}"
                yield case, graph, h, {name: value.to(dtype) for name, value in inputs.items()}


def _compare(call: Callable[..., Tensor], graph: Graph, inputs: Inputs, device: Cuda) -> None:
    """No further from float64 than twice what PyTorch is in the same type, and a rounding."""
    dtype = next(iter(inputs.values())).dtype
    there = {name: value.to(device.device) for name, value in inputs.items()}
    on_device = graph.to(device.device)
    got, again = (_run(call, on_device, there, device.backend) for _ in range(2))
    want = _run(call, graph, {n: v.double() for n, v in inputs.items()}, "reference")
    plain = {} if dtype == torch.float32 else _run(call, graph, inputs, "reference")
    for name, value in want.items():
        tolerance = None
        if name in plain and value.numel():
            scale = float(value.abs().max().clamp_min(1e-300))
            error = float((plain[name].double() - value).abs().max()) / scale
            tolerance = 2 * error + torch.finfo(dtype).eps / 2
        assert_close(name, got[name], value, tolerance=tolerance)
        assert torch.equal(got[name], again[name]), f"{name}: two runs differ"


def _run(call: Callable[..., Tensor], graph: Graph, inputs: Inputs, backend: str) -> Inputs:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = call(graph=graph, backend=backend, **leaves)
    if not out.requires_grad:
        return {"out": out}
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    grads = torch.autograd.grad(out, list(leaves.values()), weights.to(out.device, out.dtype))
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), **named}
