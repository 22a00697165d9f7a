"""The raw files of the public data sets: where they lie, whether they are whole, their contents.

They are the files that the loaders of PyG and ogb download. Nothing here uses the network, and no
`processed/` folder is written, so a read-only folder will do. Planetoid's files are pickles, which
can execute what they hold; the others are plain tables and arrays.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grand_fast.data.tables import OGB_FILES, TableError, read_ogb

if TYPE_CHECKING:
    from scipy.sparse import coo_array
    from torch_geometric.data import Data

_PLANETOID_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_PLANETOID_URL = "https://github.com/kimiyoung/planetoid/raw/master/data"
_NPZ_URL = "https://github.com/shchur/gnn-benchmark/raw/master/data/npz"
_HALF = "perhaps half-downloaded"
_OGB_ARCHIVE = "http://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip"


class DataError(Exception):
    """A data set's files are missing or damaged; the text names the file and the remedy."""


@dataclass(frozen=True)
class _Source:
    """A data set as PyG or ogb keeps it: `<folder>/<name>/<files>` below the root."""

    folder: str
    loader: str  # class in torch_geometric.datasets or ogb.nodeproppred
    name: str  # the loader's name for it
    files: tuple[str, ...]
    url: str  # of the folder with the files, or of one archive with all of them


def _planetoid(name: str) -> _Source:
    files = tuple(f"raw/ind.{name.lower()}.{part}" for part in _PLANETOID_PARTS)
    return _Source("planetoid", "Planetoid", name, files, _PLANETOID_URL)


def _npz(folder: str, loader: str, name: str, file: str) -> _Source:
    return _Source(folder, loader, name, (f"raw/{file}",), _NPZ_URL)


_SOURCES = {
    "Cora": _planetoid("Cora"),
    "CiteSeer": _planetoid("CiteSeer"),
    "PubMed": _planetoid("PubMed"),
    "CoauthorCS": _npz("coauthor", "Coauthor", "CS", "ms_academic_cs.npz"),
    "Computers": _npz("amazon", "Amazon", "Computers", "amazon_electronics_computers.npz"),
    "Photo": _npz("amazon", "Amazon", "Photo", "amazon_electronics_photo.npz"),
    "ogbn-arxiv": _Source("ogb", "NodePropPredDataset", "ogbn_arxiv", OGB_FILES, _OGB_ARCHIVE),
}
NAMES: tuple[str, ...] = tuple(_SOURCES)
PLANETOID: tuple[str, ...] = tuple(n for n, s in _SOURCES.items() if s.loader == "Planetoid")


def find(name: str, root: Path | str | None = None) -> Path:
    """The folder that holds all raw files of `name`, one of `NAMES`, in `raw/`.

    Args:
        name: of the data set.
        root: holds `planetoid/Cora/raw/…`, `Cora/raw/…` or `raw/…`, and the like for others. By
            default `$GRAND_FAST_DATA`, else `data`.

    Raises:
        DataError: names the missing file and how to get it.
    """
    source = _SOURCES[name]
    root = _root(root)
    usual = root / source.folder / source.name
    places = (usual, root / source.name, root)
    folder = next((p for p in places if any((p / file).exists() for file in source.files)), usual)
    missing = [folder / file for file in source.files if not (folder / file).is_file()]
    if not missing:
        return folder
    others = f" and {len(missing) - 1} others beside it" if len(missing) > 1 else ""
    get = _download(source, folder, missing[0])
    if len(missing) > 1 and source.url != _OGB_ARCHIVE:
        get = _download(source, usual, usual / "raw")
    raise DataError(
        f"{name}: missing file {missing[0]}{others}. Point --root or GRAND_FAST_DATA at the folder "
        f"above '{source.folder}', or download: {get}"
    )


def _root(root: Path | str | None) -> Path:
    return Path(root or os.environ.get("GRAND_FAST_DATA") or "data")


def read(name: str, root: Path | str | None = None) -> Data:
    """Features `x`, labels `y`, `edge_index`, and public masks if there are any, as PyG reads them.

    The edges of ogbn-arxiv, where papers cite papers, go both ways here.

    Raises:
        DataError: names the file that is missing or damaged and how to get it.
    """
    from torch_geometric.io import read_npz, read_planetoid_data

    source, folder = _SOURCES[name], find(name, root)
    planetoid = source.loader == "Planetoid"
    path = folder / ("raw" if planetoid else source.files[0])
    reason: str = _HALF
    problem: Exception | None = None
    try:
        if source.files == OGB_FILES:
            return read_ogb(folder)
        if planetoid:
            _check_planetoid(folder, source.files)
            data = read_planetoid_data(str(path), source.name)
        else:
            _check_npz(path)
            data = read_npz(str(path))
        _check_edges(data, folder / source.files[-2] if planetoid else path)
        return data
    except TableError as error:
        path, reason, problem = error.path, error.problem, error
    except Exception as error:  # a damaged file fails in as many ways as it has parts
        problem = error
    if folder.name != source.name:  # PyG chooses the name
        folder = _root(root) / source.folder / source.name
    raise DataError(
        f"{name}: {path} is damaged: {reason}. Delete it and download: "
        f"{_download(source, folder, path)}"
    ) from problem


def _download(source: _Source, folder: Path, path: Path) -> str:
    """The shell command that fetches a file, or all if `path` is their folder, or in an archive."""
    if source.url == _OGB_ARCHIVE:
        return (
            f"curl -fLO {source.url} && python -m zipfile -e arxiv.zip . && mkdir -p "
            f"'{folder}' && cp -r arxiv/* '{folder}'"
        )
    if path.name == "raw":
        # PyG makes the folders below its root itself, and calls that of the data set by its name
        call = f"{source.loader}('{folder.parent}', '{source.name}')"
        return f'python -c "from torch_geometric.datasets import {source.loader}; {call}"'
    return f"curl -fL --create-dirs -o '{path}' {source.url}/{path.name}"


def _check_planetoid(folder: Path, files: Sequence[str]) -> None:
    """Raise TableError for the first file that is cut short, or whose features are not numbers."""
    from scipy.sparse import coo_array

    rows = {}
    *pickles, index = (folder / file for file in files)
    for part, path in zip(_PLANETOID_PARTS, pickles, strict=False):
        try:
            with open(path, "rb") as stream:
                content = pickle.load(stream, encoding="latin1")
            rows[part] = len(content) if part == "graph" else content.shape[0]
        except Exception as error:  # unpickling can raise anything
            raise TableError(path, _HALF) from error
        if part in ("x", "tx", "allx"):
            _check_finite(path, coo_array(content))
    # Test nodes are numbered after those of allx and have one row of tx each. A list that is cut
    # still reads as a list, but breaks one of these rules.
    try:
        ids = [int(line) for line in index.read_text().split()]
    except ValueError as error:
        raise TableError(index, _HALF) from error
    if len(ids) != rows["tx"] or min(ids, default=0) < rows["allx"]:
        raise TableError(index, _HALF)
    for part, labels in (("x", "y"), ("tx", "ty"), ("allx", "ally")):
        if rows[part] != rows[labels]:
            problem = f"{part} has {rows[part]} rows and {labels} {rows[labels]}"
            raise TableError(folder / "raw", problem)


def _check_npz(path: Path) -> None:
    """Raise TableError for features that are not numbers, which PyG may take for ones."""
    from scipy.sparse import csr_array

    with np.load(path, allow_pickle=False) as archive:
        if "attr_data" in archive:
            arrays = (archive[f"attr_{name}"] for name in ("data", "indices", "indptr"))
            _check_finite(path, csr_array(tuple(arrays), tuple(archive["attr_shape"])).tocoo())


def _check_finite(path: Path, features: coo_array) -> None:
    with np.errstate(over="ignore"):  # what overflows is then not finite
        wrong = np.flatnonzero(~np.isfinite(features.data.astype(np.float32)))
    if wrong.size:
        row, column = (ids[wrong[0]] for ids in features.coords)
        raise TableError(
            path, f"features must be finite, got {features.data[wrong[0]]} at [{row}, {column}]"
        )


def _check_edges(data: Data, path: Path) -> None:
    edges, n = data.edge_index, data.x.shape[0]
    if edges.numel() and (edges.min() < 0 or edges.max() >= n):
        wrong = int(edges.min() if edges.min() < 0 else edges.max())
        raise TableError(path, f"edges must join nodes 0 to {n - 1}, got {wrong}")
