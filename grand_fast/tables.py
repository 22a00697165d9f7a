"""Tables of numbers in text files, and the folder of them in which ogb keeps a graph."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch_geometric.data import Data

_EDGES, _FEATURES, _LABELS = (f"raw/{n}.csv.gz" for n in ("edge", "node-feat", "node-label"))
_SPLIT = tuple(f"split/time/{part}.csv.gz" for part in ("train", "valid", "test"))
OGB_FILES = (_EDGES, _FEATURES, _LABELS, *_SPLIT)


class TableError(ValueError):
    """A table that is no table, or does not fit the others: `.path`, and what is wrong."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem


def read_table(path: Path, dtype: type, *, columns: int | None = None) -> np.ndarray:
    """Rows of numbers separated by commas, without a header; `.gz` files are unpacked.

    Args:
        path: of the file.
        dtype: `np.int64`, which refuses fractions, or `np.float32`.
        columns: how many there must be, or None.

    Returns:
        `[rows, columns]`.

    Raises:
        TableError: not such a table, cut short, or empty.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of an empty file, which is an error here
            table: np.ndarray = np.loadtxt(path, delimiter=",", dtype=dtype, ndmin=2)
    except (ValueError, OSError, EOFError, UnicodeDecodeError) as error:
        reason = str(error).partition("; use `usecols`")[0]
        raise TableError(path, f"must hold numbers separated by commas: {reason}") from error
    if table.size == 0:
        raise TableError(path, "must hold rows of numbers, got none")
    if columns is not None and table.shape[1] != columns:
        raise TableError(path, f"must have {columns} columns, got {table.shape[1]}")
    return table


def read_ogb(folder: Path) -> Data:
    """A graph as ogb's archives hold it, its edges made to go both ways, with masks of its split.

    Args:
        folder: holds `OGB_FILES`.

    Raises:
        TableError: names a file that is damaged or does not fit.
    """
    from torch_geometric.data import Data
    from torch_geometric.utils import remove_self_loops, to_undirected

    x = torch.from_numpy(read_table(folder / _FEATURES, np.float32))
    n = x.shape[0]
    y = torch.from_numpy(read_table(folder / _LABELS, np.int64, columns=1)[:, 0])
    if y.numel() != n:
        raise TableError(folder / _LABELS, f"must have {n} rows, one a node, got {y.numel()}")
    edges = torch.from_numpy(_node_ids(folder / _EDGES, n, columns=2)).T
    masks = {}
    for part, file in zip(("train", "val", "test"), _SPLIT, strict=True):
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.from_numpy(_node_ids(folder / file, n, columns=1)[:, 0])] = True
        masks[f"{part}_mask"] = mask
    edge_index = to_undirected(remove_self_loops(edges)[0], num_nodes=n)
    return Data(x=x, y=y, edge_index=edge_index, **masks)


def _node_ids(path: Path, n: int, *, columns: int) -> np.ndarray:
    ids = read_table(path, np.int64, columns=columns)
    if ids.min() < 0 or ids.max() >= n:
        raise TableError(path, f"must hold numbers of nodes, 0 to {n - 1}")
    return ids
