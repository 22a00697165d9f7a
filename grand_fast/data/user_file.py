"""A graph of the user's, from an npz file or from a folder of CSV files."""

import zipfile
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grand_fast.data.datasets import NodeData, Split, numbered_classes
from grand_fast.data.public_files import DataError
from grand_fast.data.tables import TableError, is_number, read_table, read_words

_REQUIRED = ("edge_index", "x", "y")
# Of each part of a split, the names of its array: of ids or a mask, of a mask, of ids
_SPLIT = {
    "train": ("train", "train_mask", "train_idx"),
    "val": ("val", "val_mask", "val_idx", "valid", "valid_mask", "valid_idx"),
    "test": ("test", "test_mask", "test_idx"),
}
_SPLIT_NAMES = tuple(name for names in _SPLIT.values() for name in names)
_ARRAYS = (*_REQUIRED, "edge_weight", *_SPLIT_NAMES)
_FORM = "edge_index, x, y and perhaps edge_weight and train, val, test"
_NEAR = 0.75  # likeness of a name to a known one, from which it is taken for a slip
_YES, _NO = ("true", "t", "yes", "y"), ("false", "f", "no", "n")
_HEADER = "Is it a header? A header is not allowed"
_UNKNOWN = ("", "-1")  # among words, of a node whose class is not known

_Arrays = dict[str, np.ndarray]


def read_graph(path: Path | str) -> NodeData:
    """A graph with features and labels, to be classified like the public ones.

    Args:
        path: an `.npz` file of these arrays, or a folder of `edge_index.csv`, `x.csv`, …, with an
            edge or a node in each row and no header, as they are or gzipped (`.csv.gz`):
            `edge_index` `[2, E]`, in CSV `[E, 2]`, integers, sender then receiver, taken as they
            are: an undirected edge stands there both ways; `x` `[N, F]`, features; `y` `[N]`,
            classes: integers, −1 where unknown, or words, empty where unknown; optionally
            `edge_weight` `[E]`; optionally, and all together, `train`, `val` (or `valid`) and
            `test`: ids of nodes, or masks `[N]` of booleans or of 0 and 1, in CSV also of words
            such as True and no. `train_mask` and `train_idx` are names for one of the two alone.

    Returns:
        The graph; its name is that of the file, and the given split its `public_split`. Classes
        other than 0, 1, … are numbered in their order, and keep what the file calls them as
        `class_names`. Nothing in a file is executed: arrays of Python objects are refused.

    Raises:
        DataError: names the file, the array, what was expected and what came.
    """
    path = Path(path)
    arrays, others = _read_csv(path) if path.is_dir() else _read_npz(path)
    for name in others:
        if near := get_close_matches(name, _ARRAYS, n=1, cutoff=_NEAR):
            raise DataError(f"{path}: `{name}` is not known. Did you mean `{near[0]}`?")
    for name in _REQUIRED:
        if name not in arrays:
            held = ", ".join((*arrays, *others)) or "none"
            raise DataError(f"{path}: `{name}` is missing; there must be {_FORM}, got {held}.")

    def check(name: str, holds: bool, expected: str, got: str | None = None) -> None:
        if not holds:
            array = arrays[name]
            came = got or f"{array.dtype} of shape {list(array.shape)}"
            raise DataError(f"{path}: `{name}` must be {expected}, got {came}.")

    def finite(name: str) -> None:
        array = arrays[name]
        with np.errstate(over="ignore"):  # what overflows is then not finite
            wrong = np.argwhere(~np.isfinite(array.astype(np.float32)))
        if wrong.size:
            at = tuple(wrong[0].tolist())
            came = f"{array.dtype} with {array[at]} at {name}[{', '.join(map(str, at))}]"
            check(name, False, "finite in float32", came)

    edges, x, y = (arrays[name] for name in _REQUIRED)
    check("x", x.ndim == 2 and x.shape[0] > 0 and x.dtype.kind in "fiub", "[N, F] numbers")
    check("x", x.shape[1] > 0, "of at least one feature")
    n = x.shape[0]
    finite("x")
    if y.dtype.kind == "U":
        header = f"{n + 1}, the first {str(y.flat[0])!r}. {_HEADER}" if y.size else ""
        check("y", y.shape == (n,), f"[N] = [{n}] words", header if y.shape == (n + 1,) else None)
    else:
        check("y", y.shape == (n,) and y.dtype.kind in "iub", f"[N] = [{n}] integers")
        check("y", y.min() >= -1, "classes from 0, or -1 where unknown", str(y.min()))
    check("edge_index", edges.ndim == 2 and edges.shape[0] == 2 and edges.dtype.kind in "iu",
          "[2, E] integers, sender then receiver")  # fmt: skip
    if edges.size:
        low, high = edges.min(), edges.max()
        check("edge_index", low >= 0 and high < n, f"numbers of nodes, 0 to {n - 1}",
              str(low if low < 0 else high))  # fmt: skip
    if "edge_weight" in arrays:
        weight = arrays["edge_weight"]
        e = edges.shape[1]
        check("edge_weight", weight.shape == (e,) and weight.dtype.kind in "fiu",
              f"[E] = [{e}] numbers")  # fmt: skip
        finite("edge_weight")

    def tensor(name: str, dtype: type) -> Tensor:
        return torch.from_numpy(arrays[name].astype(dtype))

    labels, names = _labels(y)
    data = numbered_classes(
        NodeData(
            path.name.removesuffix(".npz"),
            tensor("x", np.float32),
            torch.from_numpy(labels),
            tensor("edge_index", np.int64),
            _split(path, arrays, labels),
            tensor("edge_weight", np.float32) if "edge_weight" in arrays else None,
            names,
            tuple(others),
        )
    )
    labelled = int((data.y >= 0).sum())
    check("y", data.num_classes > 1, "of at least 2 classes", str(max(data.num_classes, 0)))
    check("y", data.num_classes < labelled, "of classes that nodes share",
          f"{data.num_classes} classes of {labelled} nodes")  # fmt: skip
    return data


def _labels(y: np.ndarray) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Integers, and the names of 0, 1, … if `y` holds words."""
    if y.dtype.kind != "U":
        return y.astype(np.int64), None
    words = np.char.strip(y)
    known = ~np.isin(words, _UNKNOWN)
    names, numbers = np.unique(words[known], return_inverse=True)
    labels = np.full(y.shape, -1, dtype=np.int64)
    labels[known] = numbers
    return labels, tuple(names.tolist())


def _split(path: Path, arrays: _Arrays, labels: np.ndarray) -> Split | None:
    given = [name for name in _SPLIT_NAMES if name in arrays]
    if not given:
        return None
    chosen = [[name for name in names if name in given] for names in _SPLIT.values()]
    if any(len(names) != 1 for names in chosen):
        once = ", each once" if len(given) >= len(_SPLIT) else ""
        raise DataError(
            f"{path}: a split must be train, val and test{once}, got {' and '.join(given)}."
        )
    taken = np.zeros(labels.size, dtype=bool)
    parts = []
    for (name,) in chosen:
        ids = _ids(path, name, arrays[name], labels.size)
        if taken[ids].any():
            raise DataError(
                f"{path}: `{name}` must share no node with the other parts of the split, got node "
                f"{ids[taken[ids]][0]} again."
            )
        if (labels[ids] < 0).any():
            node = ids[labels[ids] < 0][0]
            raise DataError(
                f"{path}: `{name}` must hold nodes whose class is known, got node {node} with "
                f"y = {arrays['y'][node] or 'nothing'}."
            )
        taken[ids] = True
        parts.append(torch.from_numpy(ids))
    (train,), (val,), (test,) = chosen
    return Split(*parts, source=f"{train}, {val} and {test} of {path.name}")


def _ids(path: Path, name: str, array: np.ndarray, n: int) -> np.ndarray:
    """The nodes of a part of the split, in order."""
    # As ids, so many zeros and ones would name two nodes over and over
    is_mask = array.shape == (n,) and array.dtype.kind in "iubf" and np.isin(array, (0, 1)).all()
    is_list = array.ndim == 1 and array.dtype.kind in "iu"
    form = "mask" if name.endswith("_mask") else "ids" if name.endswith("_idx") else ""
    if is_mask and form != "ids":
        ids = np.flatnonzero(array)
    elif is_list and form != "mask":
        ids = np.unique(array.astype(np.int64))
    else:
        ids = np.zeros(0, dtype=np.int64)
    if ids.size == 0:
        mask = f"a mask [N] = [{n}] of booleans or of 0 and 1"
        expected = {"mask": mask, "ids": "ids of nodes"}.get(form, f"ids of nodes or {mask}")
        end = " without any." if is_mask or array.size == 0 else "."
        if is_mask and form == "ids" and array.any():
            end = f". Did you mean `{name.removesuffix('_idx')}_mask`?"
        elif form == "mask" and array.shape == (n,) and array.dtype.kind in "iuf" and not is_mask:
            end = f" with {array[~np.isin(array, (0, 1))][0]} in it."
        if array.ndim == 2:
            end = ". Keep one of its columns."
        raise DataError(
            f"{path}: `{name}` must be {expected}, at least one node, got {array.dtype} of shape "
            f"{list(array.shape)}{end}"
        )
    if ids[0] < 0 or ids[-1] >= n:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise DataError(f"{path}: `{name}` must hold numbers of nodes, 0 to {n - 1}, got {wrong}.")
    return ids


def _read_npz(path: Path) -> tuple[_Arrays, list[str]]:
    """The known arrays, and the names of the others."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _ARRAYS if name in archive}
            others = [name for name in archive if name not in arrays]
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
    return arrays, others


def _read_csv(folder: Path) -> tuple[_Arrays, list[str]]:
    """The arrays of the known files, and the names of the other tables."""
    files: dict[str, Path] = {}
    for file in sorted((*folder.glob("*.csv"), *folder.glob("*.csv.gz"))):
        name = file.name.removesuffix(".gz").removesuffix(".csv")
        if name in files:
            raise DataError(f"{folder}: must hold {name}.csv or {name}.csv.gz, got both.")
        files[name] = file
    try:
        arrays = {name: _csv_array(name, files[name]) for name in _ARRAYS if name in files}
    except TableError as error:
        raise DataError(f"{str(error).rstrip('.')}.") from error
    return arrays, [name for name in files if name not in arrays]


def _csv_array(name: str, file: Path) -> np.ndarray:
    if name == "x":
        x = read_table(file, np.float32)
        columns = x.shape[1]
        # As pandas heads columns without names; of whole numbers it may be a node's features
        if columns > 2 and np.array_equal(x[0], np.arange(columns)) and (x[1:] % 1).any():
            raise TableError(file, f"got 0 to {columns - 1} in line 1. {_HEADER}")
        return x
    if name == "edge_index":
        return read_table(file, np.int64, columns=2).T
    if name == "edge_weight":
        return read_table(file, np.float32, columns=1)[:, 0]
    try:
        return read_table(file, np.int64, columns=1)[:, 0]
    except TableError:
        words = read_words(file)
        if name != "y":
            return _flags(file, words)
        if any(is_number(word, float) for _, word in words if word not in _UNKNOWN):
            raise  # one of another kind among numbers is a slip, or a header
        return np.array([word for _, word in words])


def _flags(file: Path, words: list[tuple[int, str]]) -> np.ndarray:
    """A mask that is written in words."""
    for index, (line, word) in enumerate(words):
        if word.lower() not in (*_YES, *_NO):
            header = f". {_HEADER}" if index == 0 else ""
            raise TableError(
                file, f"must hold integers, or True and False, got {word!r} in line {line}{header}"
            )
    return np.array([word.lower() in _YES for _, word in words])
