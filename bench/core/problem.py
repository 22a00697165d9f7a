"""What is measured: a shape, a problem (one operator on one graph), and who competes on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from grand_fast import Graph
from grand_fast.kernels.csr import Cost, Csr

Mode = Literal["forward", "forward+backward"]
MODES: tuple[Mode, ...] = ("forward", "forward+backward")
Function = Callable[..., Tensor]

OURS = "grand-fast"
# The peers whose ratio to ours is a figure of its own, and what its name calls them.
RIVALS = {
    "sampled_addmm + CSR": "strongest PyTorch form (sampled_addmm + CSR)",
    "released sequence": "released sequence",
    "torch.sparse (MKL)": "torch.sparse (MKL)",
}


class UnavailableError(Exception):
    """A competitor cannot run here; its text says why and what would help."""


@dataclass(frozen=True)
class Shape:
    """Channels of the state `d`, heads `H`, channels of attention `d_att` (all heads)."""

    channels: int
    heads: int
    attention_channels: int

    def __post_init__(self) -> None:
        for name in ("channels", "heads", "attention_channels"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"{flag}: must be at least 1, got {getattr(self, name)}.")
        if self.attention_channels % self.heads:
            raise ValueError(
                f"attention-channels: must be a multiple of heads = {self.heads}, "
                f"got {self.attention_channels}."
            )

    def __str__(self) -> str:
        return f"{self.channels}/{self.heads}/{self.attention_channels}"

    @property
    def d_k(self) -> int:
        """Channels of one attention head."""
        return self.attention_channels // self.heads


# The project's main shape first; then one head, many heads, and shapes that the paper tuned.
PAPER_SHAPES = (
    Shape(128, 4, 128),
    Shape(64, 1, 64),
    Shape(64, 8, 128),
    Shape(80, 8, 128),
    Shape(162, 2, 32),
    Shape(256, 4, 128),
)


@dataclass(frozen=True)
class Differentiated:
    """What a function is given, all of it differentiated, and the gradient of its result."""

    inputs: dict[str, Tensor]
    d_out: Tensor

    def double(self) -> Self:
        """The same in float64."""
        inputs = {name: t.double() for name, t in self.inputs.items()}
        return replace(self, inputs=inputs, d_out=self.d_out.double())


@dataclass(frozen=True)
class Problem(Differentiated):
    """What every competitor gets, and what its result must be.

    `core` maps the inputs to those of `reference` (projections): first those with a row per node,
    then those with an entry per edge. The output has a row per node and is `A x − x`, or without
    `is_field` `A x`; with `edge_output` it has one per edge. Without `gathers` the graph gives no
    more than the size.
    """

    op: str
    graph: Graph
    shape: Shape
    cost: Cost
    core: Callable[..., tuple[Tensor, ...]]
    reference: Callable[[Csr, Sequence[Tensor]], Tensor]
    is_field: bool = True
    edge_output: bool = False
    gathers: bool = True

    def row(self) -> dict[str, str | int]:
        """What it is, as it stands in JSON."""
        graph = self.graph
        return {"op": self.op, "shape": str(self.shape),
                "nodes": graph.num_nodes, "edges": graph.num_edges}  # fmt: skip


@dataclass(frozen=True)
class Competitor:
    """A way to compute an operator. `make` prepares what depends on the graph alone."""

    name: str
    make: Callable[[Problem], Function]
    # Floats per edge alive at the peak of forward+backward, to refuse what cannot fit.
    edge_floats: Callable[[Shape], int] = lambda shape: 0
    # False for the nearest equivalent of a library that cannot compute ours: it is not compared.
    exact: bool = True
    # True for what takes seconds a call on arxiv: the suites run it on their first shape only.
    slow: bool = False

    def bytes_needed(self, problem: Problem) -> int:
        """Estimated peak above the inputs: edge-sized tables, and some node-sized ones."""
        shape, graph = problem.shape, problem.graph
        per_node = 4 * (shape.channels + shape.attention_channels)
        return 4 * (graph.num_edges * self.edge_floats(shape) + graph.num_nodes * per_node)


def runner(function: Function, problem: Differentiated, mode: Mode) -> Callable[[], object]:
    """A call without arguments that runs one mode; forward+backward gives all gradients."""
    if mode == "forward":
        return torch.no_grad()(lambda: function(*problem.inputs.values()))
    return lambda: gradients(function, problem)


def runners(
    functions: Mapping[str, Function], problem: Differentiated
) -> dict[str, Callable[[], object]]:
    """Both modes of every competitor, by `competitor|mode`."""
    return {
        f"{name}|{mode}": runner(function, problem, mode)
        for name, function in functions.items()
        for mode in MODES
    }


def gradients(function: Function, problem: Differentiated) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and the gradients by all inputs."""
    leaves = [t.detach().requires_grad_() for t in problem.inputs.values()]
    out = function(*leaves)
    d_out = problem.d_out
    if out.shape != d_out.shape:  # a nearest equivalent, with a width of its own
        d_out = torch.ones_like(out)
    return out.detach(), torch.autograd.grad(out, leaves, d_out)
