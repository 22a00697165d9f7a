"""Hundreds of calls with one thing wrong: each ends in one clear sentence, or in the right result.

The calls are generated: every argument of every public function in turn takes every value of a
list that does not suit it, or only just. What is accepted must be what the reference makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import grand_fast as gf
from grand_fast.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

N, E, D, H, D_K = 7, 20, 3, 2, 4
REFUSED = (TypeError, ValueError, NotImplementedError)
LONGEST = 400  # characters of a message


class Subject(NamedTuple):
    """A function, arguments that suit it, and what it must give where it gives anything."""

    name: str
    call: Callable[..., Any]
    given: dict[str, Any]
    right: Callable[..., Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edges() -> Tensor:
    return torch.randint(0, N, (2, E), generator=torch.Generator().manual_seed(7))


def wrong_tensors(value: Tensor) -> Iterator[tuple[str, Any]]:
    """Instead of a floating tensor."""
    yield "None", None
    yield "str", "x"
    yield "number", 3.0
    yield "list", value.tolist()
    yield "numpy", value.numpy()
    yield "int", value.long()
    yield "bool", value > 0
    yield "complex", value.to(torch.complex64)
    yield "double", value.double()
    yield "half", value.half()
    yield "meta", value.to("meta")
    yield "sparse", value.to_sparse() if value.dim() else value.flatten()
    yield "scalar", torch.tensor(1.0)
    yield "empty", value[:0] if value.dim() else value.new_empty(0)
    yield "batch", value[None]
    yield "column", value[..., None]
    yield "long", torch.cat([value, value]) if value.dim() else value.repeat(2)
    yield "strided", torch.stack([value, value], -1)[..., 0]
    yield "nan", value * float("nan")


def wrong_graphs() -> Iterator[tuple[str, Any]]:
    yield "None", None
    yield "edge_index", edges()
    yield "list", edges().tolist()
    yield "smaller", gf.Graph.from_edge_index(edges() % (N - 1), N - 1)
    yield "larger", gf.Graph.from_edge_index(edges(), N + 1)
    yield "class", gf.Graph


def wrong_numbers() -> Iterator[tuple[str, Any]]:
    yield "None", None
    yield "str", "1.0"
    yield "True", True
    yield "list", [1.0]
    yield "complex", 1j
    yield "nan", float("nan")
    yield "inf", float("inf")
    yield "negative", -1.0
    yield "zero", 0.0
    yield "huge", 10**400
    yield "numpy", np.float64(0.5)
    yield "tensor", torch.tensor(0.5)
    yield "vector", random(D)
    yield "matrix", random(1, D)


def wrong_counts() -> Iterator[tuple[str, Any]]:
    yield "zero", 0
    yield "negative", -2
    yield "float", 2.5
    yield "True", True
    yield "str", "2"
    yield "None", None
    yield "odd", 3


def wrong_names() -> Iterator[tuple[str, Any]]:
    yield "unknown", "nothing"
    yield "None", None
    yield "number", 1
    yield "list", ["softmax"]
    yield "class", gf.ops.GAT
    yield "capital", "Softmax"


def wrong_edges() -> Iterator[tuple[str, Any]]:
    good = edges()
    yield "None", None
    yield "str", "edges"
    yield "list", good.tolist()
    yield "numpy", good.numpy()
    yield "float", good.float()
    yield "bool", good > 2
    yield "transposed", good.t()
    yield "three", torch.cat([good, good[:1]])
    yield "flat", good.flatten()
    yield "batch", good[None]
    yield "negative", good - 1
    yield "large", good + 1
    yield "2^40", torch.cat([good, torch.tensor([[2**40], [0]])], 1)
    yield "int32", good.int()
    yield "uint8", good.to(torch.uint8)
    yield "meta", good.to("meta")
    yield "no edges", good[:, :0]
    yield "strided", good.repeat_interleave(2, 1)[:, ::2]


WRONG: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
    "graph": wrong_graphs,
    "edge_index": wrong_edges,
    "heads": wrong_counts,
    "channels": wrong_counts,
    "hidden_channels": wrong_counts,
    "attention_channels": wrong_counts,
    "num_nodes": wrong_counts,
    "max_steps": wrong_counts,
    **dict.fromkeys(
        ("alpha", "beta", "T", "step_size", "rtol", "atol", "dropout", "self_loops"), wrong_numbers
    ),
    **dict.fromkeys(
        ("score", "normalizer", "normalize", "edge_order", "backend", "method", "adjoint",
         "variant", "flow"),
        wrong_names,
    ),
}  # fmt: skip


def wide(value: Any) -> Any:
    """In float64 where it is floating, as the reference is to compute."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(np.float64)
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def operator(name: str, **given: Any) -> Subject:
    function = getattr(gf.ops, name)

    def right(**arguments: Any) -> Any:
        arguments = {key: wide(value) for key, value in arguments.items()}
        return function(**arguments | {"backend": "reference"})

    return Subject(name, function, given, right)


def dense(edge_index: Any, num_nodes: Any, flow: str = "source_to_target", **_: Any) -> Tensor:
    """How many edges lead from each node to each, by hand."""
    num_nodes = int(np.asarray(edge_index).max()) + 1 if num_nodes is None else num_nodes
    found = torch.zeros(int(num_nodes), int(num_nodes))
    pairs = np.asarray(edge_index, dtype=np.int64).T
    for sends, receives in pairs if flow == "source_to_target" else pairs[:, ::-1]:
        found[receives, sends] += 1
    return found


def of_graph(**arguments: Any) -> Tensor:
    graph = gf.Graph.from_edge_index(**arguments)
    found = torch.zeros(graph.num_nodes, graph.num_nodes)
    receivers = torch.repeat_interleave(torch.arange(graph.num_nodes), graph.rowptr.diff().long())
    return found.index_put((receivers, graph.col.long()), torch.ones(graph.num_edges), True)


def layer(**arguments: Any) -> Tensor:
    """A layer made and called, with weights from a seed."""
    torch.manual_seed(0)
    x, edge_index = arguments.pop("x"), arguments.pop("edge_index")
    return gf.nn.GRANDConv(arguments.pop("channels"), **arguments)(x, edge_index)


def layer_in_float64(**arguments: Any) -> Tensor:
    torch.manual_seed(0)
    x, edge_index = arguments.pop("x"), arguments.pop("edge_index")
    made = gf.nn.GRANDConv(arguments.pop("channels"), **arguments)
    with gf.backend("reference"):
        return made.double()(x.double(), edge_index)


def decay(t: Any, x: Any) -> Any:
    return -x


def solve(**arguments: Any) -> Tensor:
    x: Tensor = gf.integrate(decay, **arguments).x
    return x


def solve_in_float64(**arguments: Any) -> Tensor:
    arguments = {name: wide(value) for name, value in arguments.items()}
    for name in ("T", "step_size"):
        if arguments[name] is not None:
            arguments[name] = float(arguments[name])
    return solve(**arguments)


def subjects() -> list[Subject]:
    graph = gf.Graph.from_edge_index(edges(), N)
    x, x0 = random(N, D), random(N, D, seed=1)
    q, k = random(N, H, D_K, seed=2), random(N, H, D_K, seed=3)
    names = {"score": "scaled_dot", "normalizer": "softmax", "normalize": "receiver"}
    field = {"x": x, "alpha": 0.7, "beta": 0.3, "x0": x0, "graph": graph, "backend": "cpu"}
    w = random(E, seed=4)
    return [
        operator("csr_diffusion", a=w, edge_order="user", **field),
        operator("attention_diffusion", q=q, k=k, edge_weight=w, **names, **field),
        operator(
            "edge_attention", q=q, k=k, edge_weight=w, graph=graph, edge_order="user",
            backend="cpu", **names,
        ),
        operator(
            "projected_attention_diffusion", weight=random(2 * H * D_K, D, seed=5),
            bias=random(2 * H * D_K, seed=6), heads=H, edge_weight=w, **names, **field,
        ),
        Subject(
            "Graph", of_graph,
            {"edge_index": edges(), "num_nodes": N, "flow": "source_to_target"}, dense,
        ),
        Subject(
            "GRANDConv", layer,
            {"x": random(N, 4), "edge_index": edges(), "channels": 4, "heads": 2,
             "attention_channels": 4, "variant": "nl", "method": "rk4", "T": 2.0,
             "step_size": 1.0, "adjoint": "checkpoint", **names},
            layer_in_float64,
        ),
        Subject(
            "integrate", solve,
            {"x0": x, "T": 1.0, "method": "rk4", "step_size": 0.5, "adjoint": "direct"},
            solve_in_float64,
        ),
    ]  # fmt: skip


def attempts() -> Iterator[tuple[Subject, str, Any, str]]:
    for subject in subjects():
        for argument, value in subject.given.items():
            wrong = WRONG.get(argument)
            values = wrong() if wrong else wrong_tensors(value)
            for label, bad in values:
                yield subject, argument, bad, f"{subject.name}-{argument}-{label}"


ATTEMPTS = list(attempts())


def assert_clear(message: str, *, names: tuple[str, ...]) -> None:
    """One sentence or two in one line, that say where and what."""
    assert "\n" not in message and len(message) <= LONGEST, message
    assert any(re.match(rf"{name}\b.*: ", message) for name in names), message


# Who speaks where a layer is called: those it calls in turn, whose arguments have the same names.
OF_LAYER = ("GRANDConv", "AttentionDiffusion", "Graph", "integrate")


@pytest.mark.parametrize(
    ("subject", "argument", "bad"),
    [attempt[:3] for attempt in ATTEMPTS],
    ids=[attempt[3] for attempt in ATTEMPTS],
)
def test_one_clear_sentence_or_the_right_result(subject, argument, bad):
    arguments = subject.given | {argument: bad}
    try:
        got = subject.call(**arguments)
    except REFUSED as refusal:
        speakers = OF_LAYER if subject.name == "GRANDConv" else (subject.name,)
        assert_clear(str(refusal), names=speakers)
        # Of two that do not fit each other either may be named.
        assert any(f"`{name}`" in str(refusal) for name in subject.given), str(refusal)
        return
    want = subject.right(**arguments)
    tolerance = 5e-3 if got.dtype == torch.float16 else 1e-5
    assert_close(argument, got, want, tolerance=tolerance)


def test_how_many_were_tried():
    """Fewer would mean that the generator lost some."""
    print(f"{len(ATTEMPTS)} calls with one argument wrong")
    assert len(ATTEMPTS) >= 200
