"""The graphs that every suite draws from, all symmetric and with a self-loop on every node."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from grand_fast import Graph
from grand_fast.ops.backends import plan

# ogbn-arxiv as the released GRAND code trains on it: both directions, repeats merged, self-loops.
ARXIV_NODES = 169_343
ARXIV_EDGES = 2_484_941
ARXIV_FILE = "ogbn_arxiv_graph.npz"
DATA_VARIABLE = "GRAND_FAST_DATA"

# Expected degree of the node of rank r is proportional to (r + 1)^-TAIL: fitted to arxiv's degrees
# (quartiles 3, 6, 14; 99 % at 106; the largest 13,161).
TAIL = 0.71
# In `local`, this part of the edges stays within a window around its first node. A hub's window
# grows with its degree, or its edges would mostly repeat each other.
NEAR_PART = 0.75
NEAR_WINDOW = 4096

# At the peak of `load`, per edge: 64-bit keys, their sorted copies and permutations (measured).
BUILDING_BYTES = 120

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def load(name: str, *, nodes: int | None = None, seed: int = 0) -> Graph:
    """The graph of one name in `GRAPHS`.

    Args:
        name: `"arxiv"` (the real one), or `"random"`, `"local"`, `"grid"` (generated).
        nodes: `N` of a generated graph, arxiv's by default; the edges grow with it.
        seed: of the generator.

    Raises:
        ValueError: unknown name, too few nodes, or arxiv's file is not there; how to get it.
    """
    if name not in GRAPHS:
        raise ValueError(f"graph: must be one of {', '.join(GRAPHS)}, got {name!r}.")
    n = ARXIV_NODES if nodes is None else nodes
    if n < 2:
        raise ValueError(f"nodes: must be at least 2, got {n}.")
    if name == "arxiv":
        if nodes is not None:
            raise ValueError("nodes: arxiv has a size of its own; use --graph random.")
        sender, receiver, n = _arxiv()
    else:
        sender, receiver = GRAPHS[name](n, np.random.default_rng(seed))
    loops = np.arange(n) * (n + 1)
    key = np.unique(np.concatenate([sender * n + receiver, receiver * n + sender, loops]))
    return Graph.from_edge_index(torch.from_numpy(np.stack([key % n, key // n])), n)


def prepare(graph: Graph) -> None:
    """Plan the kernels' work on `A` and `Aᵀ`, or the first call does it."""
    engine = "gpu" if graph.device.type == "cuda" else "cpu"
    for transposed in (False, True):
        graph.csr(plan(engine), transposed=transposed)


def edges_per_node() -> float:
    """Mean row length of the generated graphs, self-loop included."""
    return ARXIV_EDGES / ARXIV_NODES


def _arxiv() -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    folder = os.environ.get(DATA_VARIABLE)
    remedy = (
        "Save arrays src, dst (one entry an edge) and label (one a node) of ogb's "
        "NodePropPredDataset('ogbn-arxiv') there with numpy.savez, or use --graph random, "
        "which has arxiv's size and degrees."
    )
    if folder is None:
        raise ValueError(f"arxiv: set {DATA_VARIABLE} to the folder of {ARXIV_FILE}. {remedy}")
    path = Path(folder) / ARXIV_FILE
    if not path.is_file():
        raise ValueError(f"arxiv: {path} is not there. {remedy}")
    with np.load(path) as arrays:
        src, dst = arrays["src"].astype(np.int64), arrays["dst"].astype(np.int64)
        return src, dst, len(arrays["label"])


def _random(n: int, rng: np.random.Generator) -> Pairs:
    """Arxiv's size and degree tail; the ends of an edge know nothing of each other."""
    rank_to_id = rng.permutation(n)
    return _distinct_pairs(
        lambda m: (rank_to_id[_ranks(m, n, rng)], rank_to_id[_ranks(m, n, rng)]), n, rng
    )


def _local(n: int, rng: np.random.Generator) -> Pairs:
    """Numbered by community: most edges join nodes with near ids. The largest hub is ~8,000."""
    rank_to_id = rng.permutation(n)

    def sample(m: int) -> Pairs:
        rank = _ranks(m, n, rng)
        u = rank_to_id[rank]
        window = NEAR_WINDOW + 2 * edges_per_node() * (n / (rank + 1.0)) ** TAIL
        near = (u + np.rint(rng.uniform(-1, 1, m) * window).astype(np.int64)) % n
        far = rank_to_id[_ranks(m, n, rng)]
        return u, np.where(rng.random(m) < NEAR_PART, near, far)

    return _distinct_pairs(sample, n, rng)


def _grid(n: int, _: np.random.Generator) -> Pairs:
    """`n` nodes in a square, each joined to its four neighbours, numbered row by row."""
    side = int(n**0.5)
    ids = np.arange(n)
    right = ids[(ids % side != side - 1) & (ids + 1 < n)]
    down = ids[ids + side < n]
    return np.concatenate([right, down]), np.concatenate([right + 1, down + side])


def _ranks(m: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`m` ranks in [0, n), rank r with probability ∝ (r + 1)^-TAIL: the inverse of its integral."""
    power = 1 - TAIL
    rank = (1 + rng.random(m) * ((n + 1.0) ** power - 1)) ** (1 / power) - 1
    return np.minimum(rank.astype(np.int64), n - 1)


def _distinct_pairs(sample: Callable[[int], Pairs], n: int, rng: np.random.Generator) -> Pairs:
    """As many distinct undirected pairs as give arxiv's mean degree, without loops."""
    wanted = round((edges_per_node() - 1) / 2 * n)
    wanted = min(wanted, n * (n - 1) // 8)  # a tiny graph cannot have that many
    keys = np.empty(0, np.int64)
    while len(keys) < wanted:
        u, v = sample(wanted + wanted // 4)
        low, high = np.minimum(u, v), np.maximum(u, v)
        keys = np.unique(np.concatenate([keys, (low * n + high)[low != high]]))
    keys = rng.permutation(keys)[:wanted]
    return keys // n, keys % n


GRAPHS: dict[str, Callable[[int, np.random.Generator], Pairs] | None] = {
    "arxiv": None,
    "random": _random,
    "local": _local,
    "grid": _grid,
}
