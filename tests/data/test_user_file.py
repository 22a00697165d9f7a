"""A graph of the user's: what is read from npz and CSV, and what is refused."""

import gzip

import numpy as np
import pytest
import torch

from grand_fast.data.datasets import fingerprint
from grand_fast.data.public_files import DataError
from grand_fast.data.user_file import read_graph

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
    return folder


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


def lists(split):
    return [ids.tolist() for ids in (split.train, split.val, split.test)]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize(
    "names",
    [("train_mask", "val_mask", "test_mask"), ("train", "valid", "test"),
     ("train", "valid_mask", "test_mask")],
    ids="+".join,
)  # fmt: skip
def test_own_split_under_its_other_names(tmp_path, names, dtype):
    """Masks of integers are no ids: these would be nodes 0 and 1 over and over."""
    masks = [np.isin(np.arange(4), ids).astype(dtype) for ids in OWN_SPLIT.values()]
    np.savez(tmp_path / "mine.npz", **OWN, **dict(zip(names, masks, strict=True)))
    split = read_graph(tmp_path / "mine.npz").public_split
    assert lists(split) == [[2], [1], [0]]
    assert split.source == f"{names[0]}, {names[1]} and {names[2]} of mine.npz"


def test_ids_and_masks_may_be_mixed(tmp_path):
    ids = {
        "train_idx": np.array([2]),
        "valid_idx": np.array([1, 1]),
        "test": np.array([1, 0, 0, 0]),
    }
    np.savez(tmp_path / "mine.npz", **OWN, **ids)
    assert lists(read_graph(tmp_path / "mine.npz").public_split) == [[2], [1], [0]]


@pytest.mark.parametrize(
    ("given", "y", "names"),
    [
        ([1, 2, 2, -1], [0, 1, 1, -1], ("1", "2")),
        ([0, 2, 2, 5], [0, 1, 1, 2], ("0", "2", "5")),
        ([3_000_000, 7, 7, -1], [1, 0, 0, -1], ("7", "3000000")),
        ([2**40, 0, 0, -1], [1, 0, 0, -1], ("0", str(2**40))),
        ([1, 0, 1, -1], [1, 0, 1, -1], None),
        ([True, False, False, True], [1, 0, 0, 1], None),
        (["dog", "cat", "cat", ""], [1, 0, 0, -1], ("cat", "dog")),
        (["10", "9", " 9", "-1"], [0, 1, 1, -1], ("10", "9")),
    ],
    ids=str,
)
def test_classes_are_numbered_from_0_and_keep_their_names(tmp_path, given, y, names):
    np.savez(tmp_path / "mine.npz", **(OWN | {"y": np.array(given)}))
    own = read_graph(tmp_path / "mine.npz")
    assert own.y.tolist() == y and own.y.dtype == torch.int64
    assert own.class_names == names
    assert own.num_classes == len(set(y) - {-1})


def test_what_is_not_read_is_told(tmp_path):
    np.savez(tmp_path / "mine.npz", **OWN, edge_attr=np.ones((3, 2)), names=np.array(["a"] * 4))
    assert read_graph(tmp_path / "mine.npz").unread == ("edge_attr", "names")
    assert read_graph(write_csv(tmp_path / "folder", OWN | {"names": np.ones(4)})).unread == (
        "names",
    )


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
        (
            {"x": np.array([[0, 1], [2, 3], [4, np.inf], [6, 7]])},
            r"got float64 with inf at x\[2, 1\]",
        ),
        (
            {"x": np.ones((4, 0))},
            r"`x` must be of at least one feature, got float64 of shape \[4, 0",
        ),
        ({"edge_weight": np.array([1, np.nan, 1])}, r"with nan at edge_weight\[1\]"),
        ({"y": np.array([3, 3, 3, -1])}, "`y` must be of at least 2 classes, got 1"),
        ({"y": np.array([3, 1, 0, -1])}, "of classes that nodes share, got 3 classes of 3 nodes"),
        ({"y": np.array(["cat", "dog", "cat"])}, r"\[N\] = \[4\] words, got <U3 of shape \[3\]"),
        ({"edge_index": np.array([[0], [7]])}, "numbers of nodes, 0 to 3, got 7"),
        ({"edge_weights": np.ones(3)}, "`edge_weights` is not known. Did you mean `edge_weight`"),
        ({"train_ids": np.array([0])}, "`train_ids` is not known. Did you mean `train_"),
        (
            OWN_SPLIT | {"val_mask": np.ones(4, bool)},
            "val and test, each once, got train and val a",
        ),
        ({"train_mask": np.ones(4, bool)}, "must be train, val and test, got train_mask"),
        (
            OWN_SPLIT | {"test": np.zeros(4, bool)},
            r"`test` must be .*got bool of shape \[4\] without",
        ),
        (OWN_SPLIT | {"test": np.ones(3, bool)}, r"ids .* or a mask .*got bool of shape \[3\]"),
        (
            OWN_SPLIT | {"test": np.ones((4, 2), bool)},
            r"bool of shape \[4, 2\]. Keep one of its col",
        ),
        (OWN_SPLIT | {"test": np.array([0.5])}, r"got float64 of shape \[1\]"),
        (
            {"train_mask": np.array([2]), "val": np.array([1]), "test": np.array([0])},
            r"`train_mask` must be a mask \[N\] = \[4\] of booleans or of 0 and 1, .*got int64",
        ),
        (
            {"train_idx": np.eye(4, dtype=bool)[2], "val": np.array([1]), "test": np.array([0])},
            r"`train_idx` must be ids of nodes, .*got bool .*\[4\]\. Did you mean `train_mask`",
        ),
        (
            {"train_mask": np.array([0, 2, 1, 0]), "val": np.array([1]), "test": np.array([0])},
            r"`train_mask` must be a mask .*got int64 of shape \[4\] with 2 in it",
        ),
        (
            {name: np.eye(4, dtype=int)[1] for name in ("train_mask", "val_mask", "test_mask")},
            "`val_mask` must share no node with the other parts of the split, got node 1 again",
        ),
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


def csv_text(arrays):
    tables = {name: array.T if name == "edge_index" else array for name, array in arrays.items()}
    return {
        name: "".join(",".join(map(str, np.atleast_1d(row))) + "\n" for row in table)
        for name, table in tables.items()
    }


def write_text(folder, files):
    folder.mkdir()
    for name, text in files.items():
        content = text if isinstance(text, bytes) else text.encode()
        (folder / f"{name}.csv").write_bytes(content)
    return folder


MASKS = {name: np.isin(np.arange(4), ids) for name, ids in OWN_SPLIT.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text.replace("\n", "\r\n") + "\r\n\r\n",
        lambda text: text.replace("\n", "\n\n", 1) + "\n \n",
        lambda text: text.removesuffix("\n"),
    ],
    ids=["mark", "crlf", "both", "blank", "no end"],
)
def test_text_as_editors_write_it(tmp_path, change):
    files = csv_text(OWN | MASKS | {"y": np.array(["cat", "dog", "dog", "-1"])})
    plain = read_graph(write_text(tmp_path / "mine", files))
    changed = {name: change(text) for name, text in files.items()}
    got = read_graph(write_text(tmp_path / "other", changed))
    assert fingerprint(got) == fingerprint(plain)
    assert plain.class_names == ("cat", "dog") and plain.y.tolist() == [0, 1, 1, -1]
    assert lists(plain.public_split) == [[2], [1], [0]]


@pytest.mark.parametrize(
    ("yes", "no"),
    [("True", "False"), ("true", "false"), ("TRUE", "FALSE"), ("T", "F"), ("yes", "no"),
     ("Y", "N"), ("1", "0")],
)  # fmt: skip
def test_masks_in_words(tmp_path, yes, no):
    masks = {name: np.where(mask, yes, no) for name, mask in MASKS.items()}
    own = read_graph(write_text(tmp_path / "mine", csv_text(OWN | masks)))
    assert lists(own.public_split) == [[2], [1], [0]]


def test_words_may_be_quoted(tmp_path):
    files = csv_text(OWN) | {"y": '"a, b"\n"c"\n"c"\n""\n'}
    own = read_graph(write_text(tmp_path / "mine", files))
    assert own.class_names == ("a, b", "c") and own.y.tolist() == [0, 1, 1, -1]


HEADER = "Is it a header? A header is not allowed"


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("x", "a,b\n1,2\n3,4\n5,6\n7,8\n", f"got 'a' in line 1. {HEADER}"),
        ("x", ",0,1\n0,1,2\n1,3,4\n2,5,6\n3,7,8\n", f"an empty cell in line 1. {HEADER}"),
        ("x", "0,1,2\n1,2,3\n4,5.5,6\n", f"got 0 to 2 in line 1. {HEADER}"),
        ("x", "1;2\n3;4\n5;6\n7;8\n", "got '1;2' in line 1. Separate by commas, not by ';'"),
        ("x", "1\t2\n3\t4\n5\t6\n7\t8\n", r"Separate by commas, not by '\t'"),
        ("x", "1 2\n3 4\n5 6\n7 8\n", "Separate by commas, not by ' '"),
        ("x", "1,2\n\n3,nan\n5,6\n7,8\n", "finite in float32, got nan in line 3, column 2"),
        ("x", "1,2\n3,4\n5,6\n-1e39,8\n", "finite in float32, got -1e39 in line 4, column 1"),
        ("x", "1,2\n3,4\n5\n7,8\n", "2 columns at first, 1 in line 3"),
        ("x", "1,2\n3,\n5,6\n7,8\n", "got an empty cell in line 2"),
        ("x", "1,2\n3,4\n5,six\n7,8\n", "numbers separated by commas: got 'six' in line 3"),
        ("x", "", "must hold rows of numbers, got none"),
        ("x", "1,2\n".encode("utf-16"), "it is not text in UTF-8"),
        ("edge_index", "0,1\n1,2.5\n", "integers separated by commas: got '2.5' in line 2"),
        ("edge_index", "0,1\n1,9223372036854775808\n", "got '9223372036854775808' in line 2"),
        ("edge_index", "0,1,2\n1,2,0\n", "must have 2 columns, got 3"),
        ("y", "label\n0\n1\n1\n0\n", f"got 'label' in line 1. {HEADER}"),
        ("y", "0\n1\none\n0\n", "got 'one' in line 3"),
        ("y", "0.5\n1.5\n2.5\n0.5\n", "got '0.5' in line 1"),
        ("y", "cat,1\ndog,2\n", "must have 1 column, got 2 in line 1"),
        ("y", "\xe9t\xe9\n".encode("latin-1"), "must be text in UTF-8"),
        ("train", "train_mask\nTrue\nFalse\n", f"got 'train_mask' in line 1. {HEADER}"),
        ("train", "True\nFalse\nmaybe\n", "integers, or True and False, got 'maybe' in line 3"),
    ],
)
def test_csv_errors_name_file_and_line(tmp_path, file, content, text):
    folder = write_text(tmp_path / "mine", csv_text(OWN | MASKS) | {file: content})
    with pytest.raises(DataError) as error:
        read_graph(folder)
    said = str(error.value)
    assert said.startswith(f"{folder / file}.csv: ") and said.endswith(".")
    assert text in said and "\n" not in said


def test_features_that_could_be_a_header(tmp_path):
    files = csv_text(OWN | {"x": np.arange(12).reshape(4, 3)})
    assert read_graph(write_text(tmp_path / "mine", files)).x[0].tolist() == [0, 1, 2]


def test_a_header_over_words_is_named(tmp_path):
    files = csv_text(OWN) | {"y": "label\ncat\ndog\ndog\ncat\n"}
    with pytest.raises(
        DataError, match=r"`y` must be \[N\] = \[4\] words, got 5, the first 'label'. Is"
    ):
        read_graph(write_text(tmp_path / "mine", files))


def test_a_table_twice(tmp_path):
    folder = write_text(tmp_path / "mine", csv_text(OWN))
    (folder / "x.csv.gz").write_bytes(gzip.compress(b"1\n"))
    with pytest.raises(DataError, match="must hold x.csv or x.csv.gz, got both"):
        read_graph(folder)


def test_a_pickle_in_a_file_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    np.savez(tmp_path / "mine.npz", **(OWN | {"x": np.array([Trap()], dtype=object)}))
    with pytest.raises(DataError):
        read_graph(tmp_path / "mine.npz")
    assert not (tmp_path / "sprung").exists()
