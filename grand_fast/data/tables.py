"""Tables of numbers in text files, and the folder of them in which ogb keeps a graph."""

from __future__ import annotations

import csv
import gzip
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import torch

if TYPE_CHECKING:
    from torch_geometric.data import Data

_EDGES, _FEATURES, _LABELS = (f"raw/{n}.csv.gz" for n in ("edge", "node-feat", "node-label"))
_SPLIT = tuple(f"split/time/{part}.csv.gz" for part in ("train", "valid", "test"))
_ENCODING = "utf-8-sig"  # with a byte-order mark, as spreadsheets write it, or without
OGB_FILES = (_EDGES, _FEATURES, _LABELS, *_SPLIT)


class TableError(ValueError):
    """A table that is no table, or does not fit the others: `.path`, and what is wrong."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem


def read_table(path: Path, dtype: type, *, columns: int | None = None) -> np.ndarray:
    """Rows of numbers separated by commas, without a header; `.gz` files are unpacked.

    Args:
        path: of the file, UTF-8 with a byte-order mark or without; empty lines do not count.
        dtype: `np.int64`, which refuses fractions, or `np.float32`, which refuses what is not
            finite.
        columns: how many there must be, or None.

    Returns:
        `[rows, columns]`.

    Raises:
        TableError: not such a table, cut short, or empty; it names the line where one is at fault.
    """
    try:
        # Warnings of an empty file, which is an error here
        with warnings.catch_warnings(action="ignore"), _opened(path) as stream:
            lines = (line for line in stream if not line.isspace())
            table: np.ndarray = np.loadtxt(lines, delimiter=",", dtype=dtype, ndmin=2)
    except (ValueError, OSError, EOFError, UnicodeDecodeError) as error:
        reason = _fault(path, dtype) or str(error).partition("; use `usecols`")[0]
        kind = "integers" if dtype is np.int64 else "numbers"
        raise TableError(path, f"must hold {kind} separated by commas: {reason}") from error
    if table.size == 0:
        raise TableError(path, "must hold rows of numbers, got none")
    if columns is not None and table.shape[1] != columns:
        raise TableError(path, f"must have {columns} columns, got {table.shape[1]}")
    if dtype is np.float32 and not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        line, cells = next(islice(_rows(path), row, None))
        raise TableError(
            path,
            f"must hold numbers that are finite in float32, got {cells[column].strip()} in line "
            f"{line}, column {column + 1}",
        )
    return table


def read_words(path: Path) -> list[tuple[int, str]]:
    """The cells of a table with one column, and the line of each.

    Raises:
        TableError: not such a table, cut short, or empty.
    """
    try:
        with _opened(path) as stream:
            lines = [(number, line) for number, line in enumerate(stream, 1) if line.strip()]
        rows = [(number, next(csv.reader([line]))) for number, line in lines]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(path, f"must be text in UTF-8: {error}") from error
    for line, cells in rows:
        if len(cells) != 1:
            raise TableError(path, f"must have 1 column, got {len(cells)} in line {line}")
    if not rows:
        raise TableError(path, "must hold rows, got none")
    return [(line, cells[0].strip()) for line, cells in rows]


def _opened(path: Path) -> TextIO:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding=_ENCODING)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line that holds any; what follows a # does not count."""
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            text = line.partition("#")[0].strip()
            if text:
                yield number, text.split(",")


def _fault(path: Path, dtype: type) -> str | None:
    """What is wrong with the first line that is, and what to do; None if none is found."""
    kind = int if dtype is np.int64 else float
    first = None
    try:
        for line, cells in _rows(path):
            wrong = [cell.strip() for cell in cells if not is_number(cell, kind)]
            if wrong:
                separated = [s for s in (";", "\t", " ") if s in wrong[0]]
                fault = f"got {repr(wrong[0]) if wrong[0] else 'an empty cell'} in line {line}"
                if separated:
                    return f"{fault}. Separate by commas, not by {separated[0]!r}"
                # pandas begins one with an empty cell, above its index
                has_numbers = any(is_number(cell, float) for cell in cells) and wrong[0] != ""
                is_header = first is None and not has_numbers
                return f"{fault}. Is it a header? A header is not allowed" if is_header else fault
            first = first or len(cells)
            if len(cells) != first:
                return f"{first} columns at first, {len(cells)} in line {line}"
    except UnicodeDecodeError:
        return "it is not text in UTF-8. Save it as CSV UTF-8"
    except (OSError, EOFError):
        return None
    return None


def is_number(cell: str, kind: type) -> bool:
    """Whether `cell` reads as a `kind`: a float, or an int of 64 bits."""
    try:
        value = kind(cell)
    except ValueError:
        return False
    return kind is float or -(2**63) <= value < 2**63


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
        wrong = ids[(ids < 0) | (ids >= n)][0]
        raise TableError(path, f"must hold numbers of nodes, 0 to {n - 1}, got {wrong}")
    return ids
