"""A graph of the user's: what is read from npz and CSV, and what is refused."""

import numpy as np
import pytest
import torch

from grand_fast.graph_file import read_graph
from grand_fast.raw_files import DataError

OWN = {
    "edge_index": np.array([[0, 1, 2], [1, 2, 0]], dtype=np.int32),
    "x": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]),
    "y": np.array([0, 1, 1, -1]),
}
OWN_SPLIT = {"train": np.array([2]), "val": np.array([1]), "test": np.array([0])}


def write_csv(folder, arrays, suffix=".csv"):
    folder.mkdir()
    for name, array in arrays.items():
        np.savetxt(folder / f"{name}{suffix}", array.T if name == "edge_index" else array,
                   fmt="%g", delimiter=",")  # fmt: skip


@pytest.mark.parametrize("form", ["npz", "csv", "csv.gz"])
def test_own_graph(tmp_path, form):
    arrays = OWN | OWN_SPLIT | {"edge_weight": np.array([0.5, 1.0, 2.0])}
    path = tmp_path / "mine"
    if form == "npz":
        path = tmp_path / "mine.npz"
        np.savez(path, **arrays)
    else:
        write_csv(path, arrays, f".{form}")
    own = read_graph(path)
    assert own.name == "mine" and own.num_classes == 2
    assert own.x.dtype == torch.float32 and own.x.tolist() == OWN["x"].tolist()
    assert own.y.tolist() == [0, 1, 1, -1]
    assert own.edge_index.tolist() == OWN["edge_index"].tolist()
    assert own.edge_weight.tolist() == [0.5, 1.0, 2.0]
    split = own.public_split
    assert [ids.tolist() for ids in (split.train, split.val, split.test)] == [[2], [1], [0]]


def test_own_graph_without_the_optional_arrays(tmp_path):
    np.savez(tmp_path / "mine.npz", **OWN)
    own = read_graph(tmp_path / "mine.npz")
    assert own.edge_weight is None and own.public_split is None


def test_own_split_may_be_masks(tmp_path):
    masks = {name: np.isin(np.arange(4), ids) for name, ids in OWN_SPLIT.items()}
    np.savez(tmp_path / "mine.npz", **OWN, **masks)
    split = read_graph(tmp_path / "mine.npz").public_split
    assert [ids.tolist() for ids in (split.train, split.val, split.test)] == [[2], [1], [0]]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"x": None}, "`x` is missing; there must be edge_index, x, y"),
        ({"x": np.ones(4)}, r"`x` must be \[N, F\] numbers, got float64 of shape \[4\]"),
        ({"x": np.full((4, 2), np.nan)}, "`x` must be finite"),
        ({"y": np.zeros(3, int)}, r"`y` must be \[N\] = \[4\] integers, got int64 of shape \[3\]"),
        ({"y": np.zeros(4)}, "integers, got float64"),
        ({"y": np.full(4, -2)}, "classes from 0, or -1"),
        ({"edge_index": OWN["edge_index"].T}, r"`edge_index` must be \[2, E\] integers"),
        ({"edge_index": np.array([[0], [4]])}, "numbers of nodes, 0 to 3"),
        ({"edge_weight": np.ones(2)}, r"`edge_weight` must be \[E\] = \[3\] numbers"),
        ({"train": np.array([0])}, "must be train, val and test, got train"),
        (OWN_SPLIT | {"val": np.array([2])}, "`val` must share no node .* got node 2 again"),
        (OWN_SPLIT | {"test": np.array([4])}, "`test` must hold numbers of nodes, 0 to 3"),
        (OWN_SPLIT | {"test": np.array([3])}, "got node 3 with y = -1"),
        (OWN_SPLIT | {"test": np.array([], int)}, "at least one node"),
        ({"x": np.full((4, 3), 1e300)}, "`x` must be finite in float32, got float64"),
        ({"y": np.array([0, 1, 1, None], dtype=object)}, "plain arrays.*cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_own_graph_errors(tmp_path, changed, text):
    arrays = {name: array for name, array in (OWN | changed).items() if array is not None}
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=f"{path}: .*{text}"):
        read_graph(path)


def test_own_graph_that_is_no_graph(tmp_path):
    with pytest.raises(DataError, match="no such file or folder. It must be an npz file of"):
        read_graph(tmp_path / "mine.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(
        DataError, match="text.npz: must be an npz file of plain arrays.*no npz file"
    ):
        read_graph(tmp_path / "text.npz")
    write_csv(tmp_path / "folder", OWN)
    (tmp_path / "folder/x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="folder/x.csv: must hold numbers .*header is not allowed"):
        read_graph(tmp_path / "folder")


def test_a_pickle_in_a_file_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    np.savez(tmp_path / "mine.npz", **(OWN | {"x": np.array([Trap()], dtype=object)}))
    with pytest.raises(DataError):
        read_graph(tmp_path / "mine.npz")
    assert not (tmp_path / "sprung").exists()
