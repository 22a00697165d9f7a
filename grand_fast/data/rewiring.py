"""Diffusion rewiring: a graph whose edges are the strongest entries of a diffusion over the first.

A row of the diffusion matrix says where a walk of random length that starts at the node ends. It
is summed length by length, with what is too small to matter left behind (see `tolerance`), so that
a row costs the same in a small and in a large graph.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.ops.checks import check_choice, check_float

KERNELS = ("ppr", "heat")
# Entries of the dense part of a block of rows: 64 MiB, and a few times that while it is worked on.
_BLOCK = 1 << 23
_TAIL = 1e-15  # probability of the walks that are longer than any considered


def diffusion_rewiring(
    edge_index: Any,
    num_nodes: int,
    *,
    kernel: Literal["ppr", "heat"] = "ppr",
    alpha: float = 0.15,
    t: float = 5.0,
    top_k: int | None = None,
    threshold: float | None = None,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The sparsified diffusion of a graph, on which GRAND-nl-rw then learns what to keep.

    `S = Σ_l θ_l T^l` with `T = D^(−1/2) (A + I) D^(−1/2)`; `"ppr"`: `θ_l = alpha (1 − alpha)^l`,
    `"heat"`: `θ_l = e^(−t) t^l / l!`

    Args:
        edge_index: `[2, E]` (row 0 sends), or whatever `Graph.from_edge_index` takes; weights are
            not read, and repeated edges count each.
        num_nodes: `N`.
        kernel: personalised PageRank or heat.
        alpha: of `"ppr"`, the probability of a walk to end at each step, in (0, 1).
        t: of `"heat"`, the mean length of a walk, above 0.
        top_k: keep so many of the largest entries of each row of `S`; of equals, those of senders
            with lower numbers.
        threshold: instead, keep all entries of at least this.
        tolerance: a walk is not followed further from node `j` after `l` steps where the
            probability that it is there and goes on is below `tolerance · D_j`. So at most
            `E[l] / tolerance` edges are followed for a row, E[l] = (1 − alpha) / alpha or t, and no
            entry is too large; in an undirected graph it is too small by at most
            `tolerance · √(D_i D_j)` for each length at which that happens. 0 leaves nothing out.

    Returns:
        `edge_index` int64 `[2, E']` (row 0 sends), sorted by receiver, then by sender, self-loops
        included; and `edge_weight` `[E']`, float32, which sums to 1 over the edges of a receiver.
        Both on the device of `edge_index`. A receiver may keep no edge at a `threshold`.

    Memory: blocks of rows of 2^23 entries in all, whatever N (a few hundred MB), and the result.
    Not differentiable.
    Reference: Klicpera et al. 2019, equations 1 to 3; GRAND (Chamberlain et al. 2021), section 4.
    """
    _check(kernel, alpha, t, top_k, threshold, tolerance)
    from scipy.stats import geom, poisson

    graph = Graph.from_edge_index(edge_index, num_nodes)
    length = geom(alpha, loc=-1) if kernel == "ppr" else poisson(t)
    blocks = []
    for first, row, col, value in _blocks(graph.to("cpu"), length, tolerance, f"{kernel} rewiring"):
        kept = value >= threshold if top_k is None else _largest(row, value, top_k)
        row, col, value = row[kept], col[kept], value[kept]
        value /= np.bincount(row, weights=value)[row]
        edges = np.stack([col, first + row]).astype(np.int32)
        blocks.append((torch.from_numpy(edges), torch.from_numpy(value.astype(np.float32))))
    if not blocks:
        return graph.edge_index(), torch.empty(0, device=graph.device)
    edge_index, weight = (torch.cat(parts, dim=-1) for parts in zip(*blocks, strict=True))
    return edge_index.to(graph.device, torch.int64), weight.to(graph.device)


def _blocks(
    graph: Graph, length: Any, tolerance: float, label: str
) -> Iterator[tuple[int, Any, Any, Any]]:
    """Some rows of `S` at a time: number of the first; rows less that, columns, values above 0."""
    from scipy.sparse import csr_array, eye_array
    from tqdm import tqdm

    n = graph.num_nodes
    ones = np.ones(graph.num_edges)
    a = csr_array((ones, graph.col.numpy(), graph.rowptr.numpy()), shape=(n, n))
    a = (a + eye_array(n, format="csr")).tocsr()
    degree = a.sum(axis=1)
    walk = a.multiply(1 / degree[:, None]).tocsr()
    steps = np.arange(int(length.isf(_TAIL)) + 1)
    ends, goes_on = length.pmf(steps), length.sf(steps)
    root = np.sqrt(degree)
    size = max(1, _BLOCK // max(n, 1))
    for first in tqdm(range(0, n, size), desc=label, unit="block", disable=None):
        start = eye_array(min(size, n - first), n, k=first, format="csr")
        ended = _ends_of_walks(start, walk, ends, goes_on, tolerance * degree)
        row, col = np.nonzero(ended)
        yield first, row, col, ended[row, col] * root[first + row] / root[col]


def _ends_of_walks(at: Any, walk: Any, ends: Any, goes_on: Any, least: Any) -> Any:
    """`Σ_l ends_l at walk^l`, dense; what goes on from a node with less than `least` stays out."""
    from scipy.sparse import csr_array

    total = np.zeros(at.shape)
    flat = total.reshape(-1)
    for end, on in zip(ends, goes_on, strict=True):
        row = np.repeat(np.arange(at.shape[0]), np.diff(at.indptr))
        flat[row * at.shape[1] + at.indices] += end * at.data
        followed = on * at.data >= least[at.indices]
        if not followed.any():
            break
        before = np.concatenate([[0], np.cumsum(followed)])
        parts = (at.data[followed], at.indices[followed], before[at.indptr])
        at = csr_array(parts, shape=at.shape) @ walk
    return total


def _largest(row: Any, value: Any, top_k: int) -> Any:
    """Which entries, sorted by row, are among the `top_k` largest of it; of equals the first."""
    order = np.lexsort((-value, row))
    begin = np.concatenate([[0], np.cumsum(np.bincount(row))])
    kept = np.zeros(len(row), dtype=np.bool_)
    kept[order[np.arange(len(row)) - begin[row[order]] < top_k]] = True
    return kept


def _check(
    kernel: str, alpha: float, t: float, top_k: Any, threshold: Any, tolerance: float
) -> None:
    check_choice("diffusion_rewiring", "kernel", kernel, known=KERNELS)
    for name, value, low, high in (
        ("alpha", alpha, 0.0, 1.0),
        ("t", t, 0.0, math.inf),
        ("threshold", threshold, 0.0, math.inf),
        ("tolerance", tolerance, -math.ulp(0.0), math.inf),
    ):
        if value is None and name == "threshold":
            continue
        check_float("diffusion_rewiring", name, value)
        if not low < value < high:
            bound = "in (0, 1)" if high == 1.0 else "finite and above 0"
            bound = "finite and at least 0" if low < 0 else bound
            raise ValueError(f"diffusion_rewiring: `{name}` must be {bound}, got {value}.")
    if (top_k is None) == (threshold is None):
        got = "neither" if top_k is None else "both"
        raise ValueError(
            f"diffusion_rewiring: `top_k` or `threshold` must be given, one of them, got {got}. "
            "Try top_k=64."
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(
            f"diffusion_rewiring: `top_k` must be an int of at least 1, got {top_k!r}."
        )
