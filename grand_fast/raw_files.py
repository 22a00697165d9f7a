"""The raw files of the public data sets: where they lie, whether they are whole, their contents.

They are the files that the loaders of PyG and ogb download. Nothing here uses the network, and no
`processed/` folder is written, so a read-only folder will do. Planetoid's files are pickles, which
can execute what they hold; the others are plain tables and arrays.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grand_fast.tables import OGB_FILES, TableError, read_ogb

if TYPE_CHECKING:
    from torch_geometric.data import Data

_PLANETOID_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_PLANETOID_URL = "https://github.com/kimiyoung/planetoid/raw/master/data"
_NPZ_URL = "https://github.com/shchur/gnn-benchmark/raw/master/data/npz"
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
    root = Path(root or os.environ.get("GRAND_FAST_DATA") or "data")
    usual = root / source.folder / source.name
    places = (usual, root / source.name, root)
    folder = next((p for p in places if any((p / file).exists() for file in source.files)), usual)
    missing = [folder / file for file in source.files if not (folder / file).is_file()]
    if not missing:
        return folder
    others = f" and {len(missing) - 1} others beside it" if len(missing) > 1 else ""
    get = _download(source, folder, missing[0])
    if len(missing) > 1 and source.url != _OGB_ARCHIVE:
        # PyG makes the folders below its root itself
        pyg = f"{source.loader}('{root / source.folder}', '{source.name}')"
        get = f'python -c "from torch_geometric.datasets import {source.loader}; {pyg}"'
    raise DataError(
        f"{name}: missing file {missing[0]}{others}. Point --root or GRAND_FAST_DATA at the folder "
        f"above '{source.folder}', or download: {get}"
    )


def read(name: str, root: Path | str | None = None) -> Data:
    """Features `x`, labels `y`, `edge_index`, and public masks if there are any, as PyG reads them.

    The edges of ogbn-arxiv, where papers cite papers, go both ways here.

    Raises:
        DataError: names the file that is missing or damaged and how to get it.
    """
    from torch_geometric.io import read_npz, read_planetoid_data

    source, folder = _SOURCES[name], find(name, root)
    planetoid = source.loader == "Planetoid"
    path = _damaged_planetoid_file(source, folder) if planetoid else None
    problem: Exception | None = None
    if path is None:
        path = folder / ("raw" if planetoid else source.files[0])
        try:
            if planetoid:
                return read_planetoid_data(str(path), source.name)
            return read_ogb(folder) if source.files == OGB_FILES else read_npz(str(path))
        except TableError as error:
            path, problem = error.path, error
        except Exception as error:  # a damaged file fails in as many ways as it has parts
            problem = error
    raise DataError(
        f"{name}: {path} is damaged, perhaps half-downloaded. Delete it and download: "
        f"{_download(source, folder, path)}"
    ) from problem


def _download(source: _Source, folder: Path, path: Path) -> str:
    """The shell command that fetches one file, or all of them where they come in one archive."""
    if source.url == _OGB_ARCHIVE:
        return (
            f"curl -fLO {source.url} && python -m zipfile -e arxiv.zip . && mkdir -p "
            f"'{folder}' && cp -r arxiv/* '{folder}'"
        )
    return f"curl -fL --create-dirs -o '{path}' {source.url}/{path.name}"


def _damaged_planetoid_file(source: _Source, folder: Path) -> Path | None:
    """The first file that is cut short, or None."""
    rows = {}
    *pickles, index = (folder / file for file in source.files)
    for part, path in zip(_PLANETOID_PARTS, pickles, strict=False):
        try:
            with open(path, "rb") as stream:
                content = pickle.load(stream, encoding="latin1")
            rows[part] = len(content) if part == "graph" else content.shape[0]
        except Exception:  # unpickling can raise anything
            return path
    # Test nodes are numbered after those of allx and have one row of tx each. A list that is cut
    # still reads as a list, but breaks one of these rules.
    try:
        ids = [int(line) for line in index.read_text().split()]
    except ValueError:
        return index
    whole = len(ids) == rows["tx"] and min(ids, default=0) >= rows["allx"]
    return None if whole else index
