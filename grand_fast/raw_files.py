"""The raw files of the public data sets: where they lie, whether they are whole, their contents.

They are the files that PyG's loaders download. Nothing here uses the network, and no `processed/`
folder is written (reading takes a second), so a read-only folder will do.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_geometric.data import Data

_PLANETOID_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_PLANETOID_URL = "https://github.com/kimiyoung/planetoid/raw/master/data"
_NPZ_URL = "https://github.com/shchur/gnn-benchmark/raw/master/data/npz"


class DataError(Exception):
    """A data set's files are missing or damaged; the text names the file and the remedy."""


@dataclass(frozen=True)
class _Source:
    """A data set as PyG keeps it: `<folder>/<name>/raw/<files>` below the root."""

    folder: str
    loader: str  # class in torch_geometric.datasets
    name: str  # PyG's name for it
    files: tuple[str, ...]
    url: str


def _planetoid(name: str) -> _Source:
    files = tuple(f"ind.{name.lower()}.{part}" for part in _PLANETOID_PARTS)
    return _Source("planetoid", "Planetoid", name, files, _PLANETOID_URL)


_SOURCES = {
    "Cora": _planetoid("Cora"),
    "CiteSeer": _planetoid("CiteSeer"),
    "PubMed": _planetoid("PubMed"),
    "CoauthorCS": _Source("coauthor", "Coauthor", "CS", ("ms_academic_cs.npz",), _NPZ_URL),
    "Computers": _Source(
        "amazon", "Amazon", "Computers", ("amazon_electronics_computers.npz",), _NPZ_URL
    ),
    "Photo": _Source("amazon", "Amazon", "Photo", ("amazon_electronics_photo.npz",), _NPZ_URL),
}
NAMES: tuple[str, ...] = tuple(_SOURCES)


def find(name: str, root: Path | str | None = None) -> Path:
    """The folder that holds all raw files of `name`, one of `NAMES`.

    Args:
        name: of the data set.
        root: holds `planetoid/Cora/raw/…`, `Cora/raw/…` or `raw/…`, and the like for others. By
            default `$GRAND_FAST_DATA`, else `data`.

    Raises:
        DataError: names the missing file and how to get it.
    """
    source = _SOURCES[name]
    root = Path(root or os.environ.get("GRAND_FAST_DATA") or "data")
    usual = root / source.folder / source.name / "raw"
    places = (usual, root / source.name / "raw", root / "raw")
    raw = next((p for p in places if any((p / file).exists() for file in source.files)), usual)
    missing = [raw / file for file in source.files if not (raw / file).is_file()]
    if not missing:
        return raw
    if len(missing) == 1:
        others, get = "", _download(source, missing[0])
    else:
        others = f" and {len(missing) - 1} others beside it"
        # PyG makes the folders below its root itself
        pyg = f"{source.loader}('{root / source.folder}', '{source.name}')"
        get = f'python -c "from torch_geometric.datasets import {source.loader}; {pyg}"'
    raise DataError(
        f"{name}: missing file {missing[0]}{others}. Point --root or GRAND_FAST_DATA at the folder "
        f"above '{source.folder}', or download: {get}"
    )


def read(name: str, root: Path | str | None = None) -> Data:
    """Features `x`, labels `y`, `edge_index`, and public masks if there are any, as PyG reads them.

    Raises:
        DataError: names the file that is missing or damaged and how to get it.
    """
    from torch_geometric.io import read_npz, read_planetoid_data

    source, raw = _SOURCES[name], find(name, root)
    planetoid = source.loader == "Planetoid"
    path = _damaged_planetoid_file(source, raw) if planetoid else None
    problem: Exception | None = None
    if path is None:
        path = raw if planetoid else raw / source.files[0]
        try:
            return read_planetoid_data(str(raw), source.name) if planetoid else read_npz(str(path))
        except Exception as error:  # a damaged file fails in as many ways as it has parts
            problem = error
    raise DataError(
        f"{name}: {path} is damaged, perhaps half-downloaded. Delete it and download: "
        f"{_download(source, path)}"
    ) from problem


def _download(source: _Source, path: Path) -> str:
    """The shell command that fetches one file."""
    return f"curl -fL --create-dirs -o '{path}' {source.url}/{path.name}"


def _damaged_planetoid_file(source: _Source, raw: Path) -> Path | None:
    """The first file that is cut short, or None."""
    rows = {}
    *pickles, index = (raw / file for file in source.files)
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
