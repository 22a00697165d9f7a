"""Options and files of `grand-fast train` with one thing wrong: one line, or the right result."""

import argparse
import math

import numpy as np
import pytest

from grand_fast import cli
from grand_fast.data.public_files import DataError
from grand_fast.data.user_file import read_graph
from tests._command_line import own_folder  # noqa: F401  # a fixture

TEXTS = ("", "abc", "nan", "inf", "-1", "0", "1.5", "1e999", "True", "٣", "1,5", "9" * 30)
NAMES = ("--data", "--root", "--config", "--out", "--json", "--help")  # of files: any text is one


def options() -> list[argparse.Action]:
    """Those of `grand-fast train` that take a value."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = [a for a in commands.choices["train"]._actions if a.nargs != 0]
    return [a for a in found if a.option_strings and a.option_strings[0] not in NAMES]


OPTIONS = options()


@pytest.fixture(scope="module")
def parser():
    return cli._parser()


@pytest.mark.parametrize("action", OPTIONS, ids=lambda action: action.option_strings[0])
def test_options(action, parser, capsys):
    option = action.option_strings[0]
    for text in TEXTS:
        try:
            parsed = parser.parse_args(["train", f"{option}={text}"])
        except SystemExit as stop:
            out, err = capsys.readouterr()
            assert stop.code == 2 and not out, text
            assert err.count("\n") == 1 and option in err, err
            continue
        value = getattr(parsed, action.dest)
        if isinstance(value, bool | str) or value is None:
            assert str(value).lower() == text.lower()
        else:
            assert math.isfinite(value) and value == type(value)(text), text


def good() -> dict[str, np.ndarray]:
    """Two triangles of two classes."""
    pairs = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)]
    edges = np.array([*pairs, *(pair[::-1] for pair in pairs)]).T
    return {
        "edge_index": edges,
        "x": np.arange(12, dtype=np.float32).reshape(6, 2),
        "y": np.array([0, 0, 0, 1, 1, 1]),
        "edge_weight": np.ones(12, dtype=np.float32),
        "train_mask": np.array([1, 0, 0, 1, 0, 0], dtype=bool),
        "val_mask": np.array([0, 1, 0, 0, 1, 0], dtype=bool),
        "test_mask": np.array([0, 0, 1, 0, 0, 1], dtype=bool),
    }


def wrong_arrays(name: str, array: np.ndarray) -> dict[str, np.ndarray | None]:
    """None: left out."""
    first = array.copy()
    first.flat[0] = 99 if array.dtype.kind == "i" else 0
    return {
        "missing": None,
        "empty": array[..., :0],
        "short": array[:-1],
        "flat": array.reshape(1, -1, 1),
        "number": np.array(1),
        "words": np.array(["a", "b"] * 3),
        "complex": array.astype(np.complex64),
        "object": np.array([{}], dtype=object),
        "nan": np.full(array.shape, np.nan),
        "inf": np.full(array.shape, np.inf, dtype=np.float32),
        "large": array.astype(np.float64) * 1e300,
        "negative": -2 * np.ones_like(array, dtype=np.int64),
        "far": first.astype(np.int64) + 10**12,
        "fractions": array + 0.5,
        "dates": np.full(array.shape, "2026-01-01", dtype="datetime64[D]"),
    }


FILES = [
    (name, label, bad) for name, array in good().items()
    for label, bad in wrong_arrays(name, array).items()
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bad"),
    [(n, bad) for n, _, bad in FILES],
    ids=[f"{n}-{label}" for n, label, _ in FILES],
)
def test_npz_files(name, bad, tmp_path):
    arrays = good()
    if bad is None:
        del arrays[name]
    else:
        arrays[name] = bad
    path = tmp_path / "graph.npz"
    np.savez(path, **arrays)
    try:
        data = read_graph(path)
    except DataError as refusal:
        text = str(refusal)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 400, text
        assert name in text or name.removesuffix("_mask") in text, text
        return
    # What is accepted is what was written.
    assert data.x.shape == (6, 2) and np.array_equal(data.x.numpy(), np.float32(arrays["x"]))
    assert np.array_equal(data.edge_index.numpy(), arrays["edge_index"])
    classes = np.unique(arrays["y"], return_inverse=True)[1]
    assert np.array_equal(data.y.numpy(), classes)
    if name == "edge_weight":
        given = data.edge_weight is not None
        assert given == (bad is not None)
        if given:
            assert np.array_equal(data.edge_weight.numpy(), np.float32(bad))
    if name.endswith("_mask"):
        part = getattr(data.public_split, name.removesuffix("_mask"))
        assert np.array_equal(part.numpy(), np.flatnonzero(bad))


def test_how_many_were_tried():
    attempts = len(OPTIONS) * len(TEXTS)
    print(f"{attempts} options and {len(FILES)} files with one thing wrong")
    assert attempts > 200 and len(FILES) > 100
