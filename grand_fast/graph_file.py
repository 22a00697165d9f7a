"""A graph of the user's, from an npz file or from a folder of CSV files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grand_fast.data import NodeData, Split
from grand_fast.raw_files import DataError
from grand_fast.tables import TableError, read_table

_REQUIRED = ("edge_index", "x", "y")
_SPLIT = ("train", "val", "test")
_ARRAYS = (*_REQUIRED, "edge_weight", *_SPLIT)
_FORM = "edge_index, x, y and perhaps edge_weight and train, val, test"


def read_graph(path: Path | str) -> NodeData:
    """A graph with features and labels, to be classified like the public ones.

    Args:
        path: an `.npz` file of these arrays, or a folder of `edge_index.csv`, `x.csv`, …, with an
            edge or a node in each row and no header, as they are or gzipped (`.csv.gz`):
            `edge_index` `[2, E]`, in CSV `[E, 2]`, integers, sender then receiver, taken as they
            are: an undirected edge stands there both ways; `x` `[N, F]`, features; `y` `[N]`,
            classes from 0, or −1 where unknown; optionally `edge_weight` `[E]`; optionally, and
            all together, `train`, `val` and `test`: ids of nodes, or masks `[N]` of booleans.

    Returns:
        The graph; its name is that of the file, and the given split its `public_split`. Nothing in
        a file is executed: arrays of Python objects are refused.

    Raises:
        DataError: names the file, the array, what was expected and what came.
    """
    path = Path(path)
    arrays = _read_csv(path) if path.is_dir() else _read_npz(path)
    for name in _REQUIRED:
        if name not in arrays:
            raise DataError(f"{path}: `{name}` is missing; there must be {_FORM}.")

    def check(name: str, holds: bool, expected: str) -> None:
        if not holds:
            array = arrays[name]
            raise DataError(
                f"{path}: `{name}` must be {expected}, got {array.dtype} of shape "
                f"{list(array.shape)}."
            )

    def finite(name: str) -> None:
        with np.errstate(over="ignore"):  # what overflows is then not finite
            holds = np.isfinite(arrays[name].astype(np.float32)).all()
        check(name, bool(holds), "finite in float32")

    edges, x, y = (arrays[name] for name in _REQUIRED)
    check("x", x.ndim == 2 and x.shape[0] > 0 and x.dtype.kind in "fiub", "[N, F] numbers")
    n = x.shape[0]
    finite("x")
    check("y", y.shape == (n,) and y.dtype.kind in "iu", f"[N] = [{n}] integers")
    check("y", y.min() >= -1 and y.max() >= 0, "classes from 0, or -1 where unknown")
    check("edge_index", edges.ndim == 2 and edges.shape[0] == 2 and edges.dtype.kind in "iu",
          "[2, E] integers, sender then receiver")  # fmt: skip
    check("edge_index", edges.size == 0 or (edges.min() >= 0 and edges.max() < n),
          f"numbers of nodes, 0 to {n - 1}")  # fmt: skip
    if "edge_weight" in arrays:
        weight = arrays["edge_weight"]
        e = edges.shape[1]
        check("edge_weight", weight.shape == (e,) and weight.dtype.kind in "fiu",
              f"[E] = [{e}] numbers")  # fmt: skip
        finite("edge_weight")

    def tensor(name: str, dtype: type) -> Tensor:
        return torch.from_numpy(arrays[name].astype(dtype))

    return NodeData(
        path.name.removesuffix(".npz"),
        tensor("x", np.float32),
        tensor("y", np.int64),
        tensor("edge_index", np.int64),
        _split(path, arrays),
        tensor("edge_weight", np.float32) if "edge_weight" in arrays else None,
    )


def _split(path: Path, arrays: dict[str, np.ndarray]) -> Split | None:
    given = [name for name in _SPLIT if name in arrays]
    if not given:
        return None
    if len(given) < len(_SPLIT):
        raise DataError(f"{path}: a split must be train, val and test, got {' and '.join(given)}.")
    n = arrays["x"].shape[0]
    taken = np.zeros(n, dtype=bool)
    parts = []
    for name in _SPLIT:
        ids = arrays[name]
        if ids.dtype.kind == "b" and ids.shape == (n,):
            ids = np.flatnonzero(ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size == 0:
            raise DataError(
                f"{path}: `{name}` must be ids of nodes or a mask [N] = [{n}], at least one node, "
                f"got {ids.dtype} of shape {list(ids.shape)}."
            )
        ids = np.unique(ids.astype(np.int64))
        if ids[0] < 0 or ids[-1] >= n:
            raise DataError(f"{path}: `{name}` must hold numbers of nodes, 0 to {n - 1}.")
        if taken[ids].any():
            raise DataError(
                f"{path}: `{name}` must share no node with the other parts of the split, got node "
                f"{ids[taken[ids]][0]} again."
            )
        if (arrays["y"][ids] < 0).any():
            raise DataError(
                f"{path}: `{name}` must hold nodes whose class is known, got node "
                f"{ids[arrays['y'][ids] < 0][0]} with y = -1."
            )
        taken[ids] = True
        parts.append(torch.from_numpy(ids))
    return Split(*parts)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in _ARRAYS if name in archive}
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file or folder. It must be an npz file of {_FORM}, or a folder of "
            f"CSV files with these names."
        ) from None
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        if "pickle" in reason:  # numpy's advice is to trust the file
            reason = "it holds objects of Python, or is no npz file"
        raise DataError(
            f"{path}: must be an npz file of plain arrays, {_FORM}, got one that cannot be read: "
            f"{reason}. Write it with numpy.savez."
        ) from error


def _read_csv(folder: Path) -> dict[str, np.ndarray]:
    arrays = {}
    try:
        for name, file in _csv_files(folder).items():
            dtype = np.float32 if name in ("x", "edge_weight") else np.int64
            columns = {"x": None, "edge_index": 2}.get(name, 1)
            arrays[name] = read_table(file, dtype, columns=columns)
    except TableError as error:
        raise DataError(f"{error}. A header is not allowed.") from error
    return {
        name: table if name == "x" else table.T if name == "edge_index" else table[:, 0]
        for name, table in arrays.items()
    }


def _csv_files(folder: Path) -> dict[str, Path]:
    found = {}
    for name in _ARRAYS:
        for file in (folder / f"{name}.csv", folder / f"{name}.csv.gz"):
            if file.is_file():
                found[name] = file
    return found
