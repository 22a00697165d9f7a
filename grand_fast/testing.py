"""For tests and benchmarks: one comparator, one tolerance table, one source of awkward graphs."""

import math
from typing import Literal

import torch
from torch import Tensor

from grand_fast.graph import Graph

# Largest error over the largest value of the wanted tensor. float32: the sums of a hub's row in
# another order; half types: one rounding of the output (2⁻¹¹, 2⁻⁸) and room for that of the inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

GraphKind = Literal[
    "random", "empty", "no_edges", "empty_rows", "hub", "loops", "repeated", "path", "single"
]
GRAPH_KINDS: tuple[GraphKind, ...] = (
    "random", "no_edges", "empty", "empty_rows", "hub", "loops", "repeated", "path", "single",
)  # fmt: skip


def assert_close(name: str, got: Tensor, want: Tensor, *, tolerance: float | None = None) -> None:
    """Raise if `got` is further from `want` than its dtype allows, or holds a NaN `want` lacks.

    Args:
        name: what is compared, for the message.
        got: the result, any float dtype.
        want: the reference, same shape, usually float64.
        tolerance: on the largest error over the largest |want|; by default `TOLERANCE[got.dtype]`.

    Raises:
        AssertionError: worst index, both values, and the RMS of the error over that of `want`.
    """
    if tuple(got.shape) != tuple(want.shape):
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(want.shape)}")
    if tolerance is None:
        tolerance = TOLERANCE[got.dtype]
    if want.numel() == 0:
        return
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if not bool(torch.isfinite(want).all()):
        special = ~torch.isfinite(want)
        if not torch.equal(got[special].nan_to_num(7.0), want[special].nan_to_num(7.0)):
            raise AssertionError(f"{name}: infinities or NaN of the reference are not reproduced")
        got, want = got[~special], want[~special]
        if want.numel() == 0:
            return
    error = (got - want).abs()
    worst = int(torch.where(error.isnan(), torch.inf, error).argmax())
    scale = float(want.abs().max())
    ratio = float(error.flatten()[worst]) / scale if scale > 0 else float(error.flatten()[worst])
    if math.isnan(ratio) or ratio > tolerance:
        index = [int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape)]
        rms = float((got - want).norm() / want.norm().clamp_min(1e-300))
        raise AssertionError(
            f"{name}: error {ratio:.2e} of the largest value exceeds {tolerance:.0e}; "
            f"worst at {index}: got {float(got.flatten()[worst]):.9g}, "
            f"expected {float(want.flatten()[worst]):.9g}; RMS ratio {rms:.2e}"
        )


def random_edge_index(kind: GraphKind, n: int = 40, *, seed: int = 0) -> tuple[Tensor, int]:
    """An unsorted, non-symmetric edge index `[2, E]` (row 0 sends) and the number of nodes.

    Kinds: `random`; `empty` (no nodes); `no_edges`; `empty_rows` (first, last and a run of nodes
    receive nothing, others send nothing); `hub` (node 1 receives from and node 2 sends to 40·n
    edges more); `loops`; `repeated`; `path`; `single` (one node, one loop).
    """
    g = torch.Generator().manual_seed(seed)
    if kind == "empty":
        return torch.empty(2, 0, dtype=torch.int64), 0
    if kind == "no_edges":
        return torch.empty(2, 0, dtype=torch.int64), n
    if kind == "single":
        return torch.zeros(2, 1, dtype=torch.int64), 1
    if kind == "path":
        return torch.stack([torch.arange(n - 1), torch.arange(1, n)]), n
    edges = torch.randint(0, n, (2, 5 * n), generator=g)
    if kind == "empty_rows":
        silent = torch.isin(edges[1], torch.tensor([0, 5, 6, 7, n - 1]))
        mute = torch.isin(edges[0], torch.tensor([0, 3, 4, n - 2]))
        edges = edges[:, ~(silent | mute)]
    elif kind == "hub":
        others = torch.randint(0, n, (2, 40 * n), generator=g)
        receives = torch.stack([others[0], torch.ones_like(others[0])])
        sends = torch.stack([torch.full_like(others[1], 2), others[1]])
        edges = torch.cat([edges, receives, sends], dim=1)
    elif kind == "loops":
        edges = torch.cat([edges, torch.arange(n).repeat(2, 1)], dim=1)
    elif kind == "repeated":
        edges = edges.repeat(1, 3)
    return edges[:, torch.randperm(edges.shape[1], generator=g)], n


def random_graph(kind: GraphKind, n: int = 40, *, seed: int = 0) -> Graph:
    """The edges of `random_edge_index(kind, n, seed=seed)` as a `Graph`."""
    edge_index, num_nodes = random_edge_index(kind, n, seed=seed)
    return Graph.from_edge_index(edge_index, num_nodes)
