"""Data sets and splits; the public ones where their files are at hand."""

import gzip
import os
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from grand_fast.data import datasets, public_files
from grand_fast.data.public_files import DataError

ROOT = os.environ.get("GRAND_FAST_DATA")
needs_files = pytest.mark.skipif(
    not ROOT, reason="GRAND_FAST_DATA is not set to a folder with the public data sets"
)

# Table 3 of the paper: nodes, undirected edges, features and classes of the largest component
LARGEST_COMPONENT = {
    "Cora": (2485, 5069, 1433, 7),
    "CiteSeer": (2120, 3679, 3703, 6),
    "PubMed": (19717, 44324, 500, 3),
    "CoauthorCS": (18333, 81894, 6805, 15),
    "Computers": (13381, 245778, 767, 10),
    "Photo": (7487, 119043, 745, 8),
}
# Nodes in the published split: training, validation, test
PUBLIC_SPLIT = {
    "Cora": (140, 500, 1000),
    "CiteSeer": (120, 500, 1000),
    "PubMed": (60, 500, 1000),
}


def planetoid_files(folder, name="Cora", *, n=2000, known=1000, classes=7, features=9):
    """Files like those of Planetoid: a ring of `n` nodes, the last of them for testing."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x = csr_matrix(rng.integers(0, 2, (n, features)).astype(np.float32))
    y = np.eye(classes, dtype=np.int32)[np.arange(n) % classes]
    parts = {
        "x": x[:140], "tx": x[known:], "allx": x[:known],
        "y": y[:140], "ty": y[known:], "ally": y[:known],
        "graph": {i: [(i - 1) % n, (i + 1) % n] for i in range(n)},
    }  # fmt: skip
    for part, content in parts.items():
        (folder / f"ind.{name.lower()}.{part}").write_bytes(pickle.dumps(content))
    order = rng.permutation(np.arange(known, n))
    np.savetxt(folder / f"ind.{name.lower()}.test.index", order, fmt="%d")


def assert_splits_nodes(split, n):
    ids = torch.cat([split.train, split.val, split.test])
    assert torch.equal(ids.sort().values, torch.arange(n))


def test_digits():
    digits = datasets.load("digits")
    assert digits.x.shape == (1797, 64)
    assert (digits.x.min(), digits.x.max()) == (0, 1)
    assert digits.num_classes == 10
    sender, receiver = digits.edge_index
    assert bool((sender != receiver).all())
    edges = set(zip(sender.tolist(), receiver.tolist(), strict=True))
    assert edges == {(j, i) for i, j in edges}
    assert int(receiver.bincount(minlength=1797).min()) >= 10


def test_digits_neighbours():
    few, many = (datasets.load("digits", neighbours=n).edge_index.shape[1] for n in (3, 20))
    assert 3 * 1797 <= few < many
    with pytest.raises(ValueError, match=r"`neighbours` must lie in \[1, 1796\], got 1797"):
        datasets.load("digits", neighbours=1797)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="one of digits, Cora, .*, ogbn-arxiv, got 'cora2'"):
        datasets.load("cora2")


def test_random_split():
    y = datasets.load("digits").y
    split = datasets.random_split(y, seed=1, labels_per_class=10, development=400)
    assert_splits_nodes(split, 1797)
    assert y[split.train].bincount().tolist() == [10] * 10
    assert split.train.numel() + split.val.numel() == 400
    again = datasets.random_split(y, seed=1, labels_per_class=10, development=400)
    other = datasets.random_split(y, seed=2, labels_per_class=10, development=400)
    assert torch.equal(split.train, again.train)
    assert not torch.equal(split.train, other.train)


def test_random_split_is_that_of_the_released_code():
    """`set_train_val_test_split` of the paper's code, written out."""
    y = datasets.load("digits").y.numpy()
    random = np.random.RandomState(3)
    chosen = random.choice(y.size, 1500, replace=False)
    random, train = np.random.RandomState(3), []
    for label in range(10):
        train.extend(random.choice(chosen[y[chosen] == label], 20, replace=False))
    split = datasets.random_split(
        torch.from_numpy(y), seed=3, labels_per_class=20, development=1500
    )
    assert split.train.tolist() == sorted(train)
    assert split.val.tolist() == sorted(set(chosen) - set(train))


@pytest.mark.parametrize(
    ("labels", "development", "text"),
    [
        (60, 400, r"`labels_per_class` must be at most \d+, .*, got 60"),
        (10, 1797, "more nodes than that, got 1797"),
    ],
)
def test_random_split_refuses_what_cannot_be(labels, development, text):
    y = datasets.load("digits").y
    with pytest.raises(ValueError, match=text):
        datasets.random_split(y, seed=0, labels_per_class=labels, development=development)


def test_random_split_leaves_out_nodes_without_a_label():
    y = torch.arange(90) % 3
    y[10:40] = -1
    split = datasets.random_split(y, seed=0, labels_per_class=5, development=30)
    ids = torch.cat([split.train, split.val, split.test])
    assert sorted(ids.tolist()) == [*range(10), *range(40, 90)]


def test_label_spreading_uses_our_graph_and_labels():
    digits = datasets.load("digits")
    split = datasets.random_split(digits.y, seed=0, labels_per_class=10, development=400)
    assert datasets.label_spreading_accuracy(digits, split) > 0.93
    no_edges = datasets.NodeData("digits", digits.x, digits.y, digits.edge_index[:, :1])
    assert datasets.label_spreading_accuracy(no_edges, split) < 0.2


def test_label_spreading_is_chosen_by_validation_alone(monkeypatch):
    """The alpha that is best on the test nodes is another, and worst in validation."""
    y = torch.arange(12) % 3
    split = datasets.Split(torch.arange(3), torch.arange(3, 6), torch.arange(6, 12))
    given = datasets.NodeData("made", torch.ones(12, 1), y, torch.arange(12).expand(2, -1))
    right = {0.2: (2, 1), 0.5: (1, 3), 0.8: (3, 2), 0.9: (0, 6), 0.95: (2, 5), 0.99: (1, 4)}

    class LabelSpreading:
        def __init__(self, kernel, alpha, max_iter):
            self.alpha = alpha

        def fit(self, x, known):
            assert known.tolist() == [0, 1, 2, *[-1] * 9]  # of the others no label is told
            val, test = right[self.alpha]
            self.transduction_ = y.numpy().copy()
            self.transduction_[3 : 6 - val] = -2
            self.transduction_[6 : 12 - test] = -2
            return self

    monkeypatch.setattr("sklearn.semi_supervised.LabelSpreading", LabelSpreading)
    assert set(right) == set(datasets._SPREADING_ALPHAS)
    assert datasets.label_spreading_accuracy(given, split) == 2 / 6


def test_numbered_classes():
    edges = torch.empty(2, 0, dtype=torch.int64)
    whole = datasets.NodeData("made", torch.ones(5, 1), torch.tensor([4, -1, 2, 4, 9]), edges)
    numbered = datasets.numbered_classes(whole)
    assert numbered.y.tolist() == [1, -1, 0, 1, 2]
    assert numbered.class_names == ("2", "4", "9") and numbered.num_classes == 3
    assert datasets.numbered_classes(numbered) is numbered
    # Of which a class has no nodes left
    for y, want, names in (
        ([0, 0, 2, 2, -1], [0, 0, 1, 1, -1], ("2", "9")),
        ([0, 1, 1, 0, 1], [0, 1, 1, 0, 1], ("2", "4")),
    ):
        part = datasets.numbered_classes(replace(numbered, y=torch.tensor(y)))
        assert (part.y.tolist(), part.class_names) == (want, names)


def test_random_split_calls_classes_by_their_names():
    with pytest.raises(ValueError, match="the nodes of class dog among 20 drawn .* a larger `deve"):
        datasets.random_split(torch.tensor([0] * 25 + [1] * 5), seed=0, labels_per_class=8,
                          development=20, class_names=("cat", "dog"))  # fmt: skip


def test_largest_component():
    edges = torch.tensor([[0, 1, 2, 3, 3, 4], [1, 0, 3, 2, 4, 3]])
    whole = datasets.NodeData("made", torch.arange(5.0)[:, None], torch.arange(5), edges)
    part = datasets.largest_component(whole)
    assert part.x.flatten().tolist() == [2.0, 3.0, 4.0]
    assert part.y.tolist() == [2, 3, 4]
    assert part.edge_index.sort(dim=1).values.tolist() == [[0, 1, 1, 2], [0, 1, 1, 2]]


def test_largest_component_keeps_edge_weights():
    edges = torch.tensor([[0, 1, 2, 3, 3, 4], [1, 0, 3, 2, 4, 3]])
    weight = torch.arange(6.0)
    whole = datasets.NodeData("made", torch.arange(5.0)[:, None], torch.arange(5), edges)
    part = datasets.largest_component(replace(whole, edge_weight=weight))
    assert part.edge_weight.tolist() == [2.0, 3.0, 4.0, 5.0]
    assert datasets.largest_component(whole).edge_weight is None


def test_row_normalized():
    """Counts become shares; a node without words stays as it is."""
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0], [0.2, 0.2]])
    whole = datasets.NodeData("made", x, torch.arange(3), torch.empty(2, 0, dtype=torch.int64))
    assert datasets.row_normalized(whole).x.tolist() == [[0.25, 0.75], [0, 0], x[2].tolist()]


def test_largest_component_keeps_what_lies_in_it_of_a_split():
    edges = torch.tensor([[1, 3, 3, 4, 0, 2], [3, 1, 4, 3, 2, 0]])
    split = datasets.Split(torch.tensor([4, 0]), torch.tensor([3]), torch.tensor([2, 1]))
    x = torch.arange(5.0)[:, None]
    part = datasets.largest_component(datasets.NodeData("made", x, torch.arange(5), edges, split))
    assert part.x.flatten().tolist() == [1, 3, 4]
    kept = part.public_split
    assert part.y[kept.train].tolist() == [4]
    assert part.y[kept.val].tolist() == [3]
    assert part.y[kept.test].tolist() == [1]


@pytest.mark.parametrize("place", ["planetoid/Cora/raw", "Cora/raw", "raw"])
def test_planetoid_files(tmp_path, place):
    planetoid_files(tmp_path / place)
    cora = datasets.load("Cora", root=tmp_path)
    assert cora.x.shape == (2000, 9)
    assert cora.edge_index.shape == (2, 4000)
    split = cora.public_split
    assert [ids.numel() for ids in (split.train, split.val, split.test)] == [140, 500, 1000]
    assert not list(tmp_path.rglob("processed"))


def test_root_comes_from_the_environment(tmp_path, monkeypatch):
    planetoid_files(tmp_path / "Cora/raw")
    monkeypatch.setenv("GRAND_FAST_DATA", str(tmp_path))
    assert public_files.find("Cora") == tmp_path / "Cora"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError) as nothing:
        datasets.load("Cora", root=tmp_path)
    text = str(nothing.value)
    assert f"missing file {tmp_path}/planetoid/Cora/raw/ind.cora.x and 7 others" in text
    assert f"Planetoid('{tmp_path}/planetoid', 'Cora')" in text
    with pytest.raises(DataError, match="amazon/Photo/raw/amazon_electronics_photo.npz"):
        datasets.load("Photo", root=tmp_path)

    planetoid_files(tmp_path / "Cora/raw")
    (tmp_path / "Cora/raw/ind.cora.ty").unlink()
    with pytest.raises(DataError, match=f"missing file {tmp_path}/Cora/raw/ind.cora.ty[.] .*curl"):
        datasets.load("Cora", root=tmp_path)


@pytest.mark.parametrize("part", ["x", "tx", "allx", "y", "ty", "ally", "graph", "test.index"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_cut_file_is_named(tmp_path, part, kept):
    planetoid_files(tmp_path / "Cora/raw")
    path = tmp_path / f"Cora/raw/ind.cora.{part}"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=f"{path} is damaged.*https://"):
        datasets.load("Cora", root=tmp_path)


def test_a_cut_archive_is_named(tmp_path):
    path = tmp_path / "Photo/raw/amazon_electronics_photo.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, attr_data=np.ones(1000))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=f"{path} is damaged.*https://"):
        datasets.load("Photo", root=tmp_path)


def changed_part(folder, part, change):
    path = folder / f"ind.cora.{part}"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))
    return path


def with_value(value):
    def change(x):
        x = x.tolil()
        x[3, 4] = value
        return x.tocsr()

    return change


@pytest.mark.parametrize("part", ["x", "tx", "allx"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_planetoid_features_that_are_not_finite(tmp_path, part, value):
    planetoid_files(tmp_path / "Cora/raw")
    path = changed_part(tmp_path / "Cora/raw", part, with_value(value))
    with pytest.raises(DataError) as error:
        datasets.load("Cora", root=tmp_path)
    text = f"Cora: {path} is damaged: features must be finite, got {value} at [3, 4]. Delete it and"
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_features_of_an_archive_that_are_not_finite(tmp_path, value):
    """PyG makes 1 of what is above 0, infinity too."""
    path = tmp_path / "Photo/raw/amazon_electronics_photo.npz"
    path.parent.mkdir(parents=True)
    ring = csr_matrix(np.roll(np.eye(5), 1, axis=1))
    x = csr_matrix(np.eye(5, 7, k=2))
    x[3, 5] = value
    arrays = {f"{name}_{part}": getattr(matrix, part) for part in ("data", "indices", "indptr",
              "shape") for name, matrix in (("adj", ring), ("attr", x))}  # fmt: skip
    np.savez(path, **arrays, labels=np.arange(5) % 2)
    with pytest.raises(DataError) as error:
        datasets.load("Photo", root=tmp_path)
    assert f"{path} is damaged: features must be finite, got {value} at [3, 5]" in str(error.value)
    arrays["attr_data"][:] = 1
    np.savez(path, **arrays, labels=np.arange(5) % 2)
    assert datasets.load("Photo", root=tmp_path).x.sum() == 5


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("ally", lambda y: y[:900], "allx has 1000 rows and ally 900"),
        ("y", lambda y: y[:100], "x has 140 rows and y 100"),
        ("graph", lambda graph: list(graph.values()), "perhaps half-downloaded"),
        ("tx", lambda x: x[:, :5], "perhaps half-downloaded"),
    ],
)
@pytest.mark.parametrize("place", ["planetoid/Cora", "Cora", "."])
def test_files_that_do_not_fit_are_downloaded_together(tmp_path, place, part, change, reason):
    """None of them is known to be at fault, and their folder has no address."""
    root = tmp_path / "root"
    folder = root / place
    planetoid_files(folder / "raw")
    changed_part(folder / "raw", part, change)
    with pytest.raises(DataError) as error:
        datasets.load("Cora", root=root)
    parent = folder.parent if place != "." else root / "planetoid"
    assert str(error.value) == (
        f"Cora: {folder / 'raw'} is damaged: {reason}. Delete it and download: python -c "
        f"\"from torch_geometric.datasets import Planetoid; Planetoid('{parent}', 'Cora')\""
    )


def test_edges_of_nodes_that_are_not_there(tmp_path):
    planetoid_files(tmp_path / "Cora/raw")
    path = changed_part(tmp_path / "Cora/raw", "graph", lambda graph: graph | {5: [2000]})
    with pytest.raises(DataError) as error:
        datasets.load("Cora", root=tmp_path)
    assert f"{path} is damaged: edges must join nodes 0 to 1999, got 2000." in str(error.value)
    assert str(error.value).endswith("/master/data/ind.cora.graph")


@pytest.mark.parametrize("name", public_files.NAMES)
@pytest.mark.parametrize("lacks", ["all", "one"])
def test_advice_names_files_that_are_there_to_be_had(tmp_path, name, lacks):
    """Each address ends with the name of a file, and none with a folder's."""
    source = public_files._SOURCES[name]
    folder = tmp_path / source.folder / source.name
    for file in source.files[1:] if lacks == "one" else ():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    with pytest.raises(DataError) as error:
        public_files.find(name, tmp_path)
    (address,) = re.findall(r"https?://\S+", str(error.value)) or [None]
    one_by_one = source.url + "/" + source.files[0].removeprefix("raw/")
    if source.loader == "Planetoid" and lacks == "all":
        assert address is None
    else:
        assert address == (source.url if name == "ogbn-arxiv" else one_by_one)


def arxiv_files(folder, **changed):
    """Files in ogb's layout: five papers, the last of which cites itself and is cited twice."""
    tables = {
        "raw/edge": [[0, 1], [1, 2], [2, 1], [3, 4], [0, 4], [4, 4]],
        "raw/node-feat": [[0.5, -1.0], [0.25, 3e-3], [1, 2], [3, 4], [5, 6]],
        "raw/node-label": [[2], [0], [1], [1], [0]],
        "split/time/train": [[3], [0]],
        "split/time/valid": [[1]],
        "split/time/test": [[2], [4]],
    }
    for name, rows in (tables | changed).items():
        path = folder / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(",".join(map(str, row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()))


@pytest.mark.parametrize("place", ["ogb/ogbn_arxiv", "ogbn_arxiv", "."])
def test_ogbn_arxiv(tmp_path, place):
    arxiv_files(tmp_path / place)
    arxiv = datasets.load("ogbn-arxiv", root=tmp_path)
    assert arxiv.x.dtype == torch.float32 and arxiv.x[1].tolist() == [0.25, float(np.float32(3e-3))]
    assert arxiv.y.tolist() == [2, 0, 1, 1, 0]
    both_ways = {(0, 1), (1, 2), (3, 4), (0, 4)}
    edges = set(map(tuple, arxiv.edge_index.T.tolist()))
    assert edges == both_ways | {(j, i) for i, j in both_ways}
    assert arxiv.edge_index.shape == (2, 8)
    split = arxiv.public_split
    assert [ids.tolist() for ids in (split.train, split.val, split.test)] == [[0, 3], [1], [2, 4]]


def test_missing_ogbn_arxiv(tmp_path):
    with pytest.raises(DataError) as nothing:
        datasets.load("ogbn-arxiv", root=tmp_path)
    folder = f"{tmp_path}/ogb/ogbn_arxiv"
    assert f"missing file {folder}/raw/edge.csv.gz and 5 others" in str(nothing.value)
    assert "arxiv.zip && " in str(nothing.value) and f"'{folder}'" in str(nothing.value)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("raw/edge", [[0, 5]]),
        ("raw/edge", [[0, 1, 2]]),
        ("raw/edge", []),
        ("raw/node-feat", [[1, 2], [3, "x"]]),
        ("raw/node-feat", [[1, 2], [3, "nan"], [1, 2], [1, 2], [1, 2]]),
        ("raw/node-label", [[0], [1]]),
        ("split/time/test", [[-1]]),
    ],
)
def test_damaged_ogbn_arxiv(tmp_path, name, rows):
    arxiv_files(tmp_path / "ogbn_arxiv", **{name: rows})
    path = tmp_path / "ogbn_arxiv" / f"{name}.csv.gz"
    with pytest.raises(DataError, match=f"{path} is damaged.*arxiv.zip"):
        datasets.load("ogbn-arxiv", root=tmp_path)


def test_features_of_ogbn_arxiv_that_are_not_finite(tmp_path):
    arxiv_files(tmp_path / "ogbn_arxiv", **{"raw/node-feat": [[1, 2], [1, 2], [3, "inf"]]})
    path = tmp_path / "ogbn_arxiv/raw/node-feat.csv.gz"
    with pytest.raises(DataError) as error:
        datasets.load("ogbn-arxiv", root=tmp_path)
    text = "must hold numbers that are finite in float32, got inf in line 3, column 2. Delete it"
    assert f"{path} is damaged: {text}" in str(error.value)


def test_a_cut_table_of_ogbn_arxiv_is_named(tmp_path):
    arxiv_files(tmp_path / "ogbn_arxiv")
    path = tmp_path / "ogbn_arxiv/raw/node-feat.csv.gz"
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=f"{path} is damaged"):
        datasets.load("ogbn-arxiv", root=tmp_path)


def test_fingerprint():
    mine = datasets.NodeData("a", torch.ones(3, 2), torch.arange(3), torch.zeros(2, 4, dtype=int))
    same = datasets.NodeData("b", torch.ones(3, 2), torch.arange(3), torch.zeros(2, 4, dtype=int))
    assert datasets.fingerprint(mine) == datasets.fingerprint(same)
    others = [
        replace(mine, x=torch.zeros(3, 2)),
        replace(mine, edge_weight=torch.ones(4)),
        replace(mine, public_split=datasets.Split(*torch.arange(3).split(1))),
        replace(mine, class_names=("a", "b", "c")),
        replace(mine, class_names=("a", "b", "d")),
    ]
    assert len({datasets.fingerprint(other) for other in [mine, *others]}) == 6


@needs_files
@pytest.mark.parametrize("name", LARGEST_COMPONENT)
def test_public_data(name):
    whole = datasets.load(name, root=ROOT)
    part = datasets.largest_component(whole)
    nodes, edges, features, classes = LARGEST_COMPONENT[name]
    assert (part.num_nodes, part.edge_index.shape[1]) == (nodes, 2 * edges)
    assert (part.x.shape[1], part.num_classes) == (features, classes)
    if name in PUBLIC_SPLIT:
        split = whole.public_split
        sizes = tuple(ids.numel() for ids in (split.train, split.val, split.test))
        assert sizes == PUBLIC_SPLIT[name]
    else:
        assert whole.public_split is None
