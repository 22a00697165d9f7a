"""Data sets for node classification, and their splits.

`digits` is built from scikit-learn's bundled images and needs no files; see `public_files` for the
others.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grand_fast.data import features, public_files
from grand_fast.ops.checks import check_choice

DATASETS: tuple[str, ...] = ("digits", *public_files.NAMES)
SPLITS: tuple[str, ...] = ("planetoid", "public", "random")
COMPONENTS: tuple[str, ...] = ("largest", "all")
_SPREADING_ALPHAS = (0.2, 0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True, eq=False)
class Split:
    """Node ids for training, for choosing the model, and for the final figure; disjoint.

    `source` says where they stand, if that is a file of the user's.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    source: str = field(default="", kw_only=True)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The ids `[n]` of each part, by the names train, val and test."""
        return {"train": self.train, "val": self.val, "test": self.test}


@dataclass(frozen=True, eq=False)
class NodeData:
    """A graph with features and one label a node.

    Attributes:
        name: one of `DATASETS`, or of the user's file.
        x: features `[N, F]`, float32, dense or `torch.sparse_csr`.
        y: labels `[N]`, int64; −1 where unknown, in a graph of the user's.
        edge_index: `[2, E]`, row 0 sends; in `DATASETS` each undirected edge goes both ways, and
            there are no self-loops.
        public_split: the split published with the data, or None.
        edge_weight: `[E]`, float32, or None.
        class_names: of the classes 0, 1, …, where they have others than their numbers.
        unread: what the user's file holds beside these.
    """

    name: str
    x: Tensor
    y: Tensor
    edge_index: Tensor
    public_split: Split | None = None
    edge_weight: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    unread: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        """`N`, the rows of `x`."""
        return self.x.shape[0]

    @property
    def num_classes(self) -> int:
        """Classes are numbered from 0."""
        return int(self.y.max()) + 1


def numbered_classes(data: NodeData) -> NodeData:
    """The classes that have nodes, numbered from 0 in their order; they keep their names."""
    present = torch.unique(data.y[data.y >= 0])
    names, labels = data.class_names, present.tolist()
    if labels == list(range(len(labels))) and len(names or labels) == len(labels):
        return data
    y = torch.searchsorted(present, data.y).where(data.y >= 0, -1)
    kept = tuple(str(label) if names is None else names[label] for label in labels)
    return replace(data, y=y, class_names=kept)


def load(name: str, *, root: Path | str | None = None, neighbours: int = 10) -> NodeData:
    """Read or build one of `DATASETS`, whole.

    Args:
        name: one of `DATASETS`.
        root: of the raw files, see `public_files.find`; not used by `digits`.
        neighbours: of each image in the graph of `digits`; not used by the others.

    Raises:
        DataError: files are missing or damaged. ValueError: unknown name.
    """
    check_choice("data", "name", name, known=DATASETS)
    if name == "digits":
        return _digits(neighbours)
    data = public_files.read(name, root)
    public = None
    if "train_mask" in data:
        masks = (data.train_mask, data.val_mask, data.test_mask)
        public = Split(*(mask.nonzero().flatten() for mask in masks))
    return NodeData(name, data.x, data.y, data.edge_index, public)


def fingerprint(data: NodeData) -> str:
    """Sixteen hexadecimal digits that differ for other features, labels, edges, splits or names."""
    split = data.public_split
    tensors = [*features.plain_arrays(data.x), data.y, data.edge_index, data.edge_weight]
    tensors += [None] * 3 if split is None else list(split.parts.values())
    total = hashlib.sha256()
    if data.class_names is not None:
        total.update(repr(data.class_names).encode())
    for tensor in tensors:
        total.update(b"none" if tensor is None else str(tuple(tensor.shape)).encode())
        if tensor is not None:
            total.update(tensor.numpy().tobytes())
    return total.hexdigest()[:16]


def largest_component(data: NodeData) -> NodeData:
    """The subgraph of the largest connected component; of a public split what lies in it."""
    from torch_geometric.data import Data
    from torch_geometric.transforms import LargestConnectedComponents

    ids = torch.arange(data.num_nodes)
    whole = Data(x=ids, edge_index=data.edge_index, edge_weight=data.edge_weight)
    part = LargestConnectedComponents()(whole)
    return replace(
        data,
        x=features.chosen_rows(data.x, part.x),
        y=data.y[part.x],
        edge_index=part.edge_index,
        public_split=_within(data.public_split, part.x, data.num_nodes),
        edge_weight=part.edge_weight,
    )


def _within(split: Split | None, kept: Tensor, nodes: int) -> Split | None:
    """The nodes of a split that are kept, by their new numbers."""
    if split is None:
        return None
    number = torch.full((nodes,), -1)
    number[kept] = torch.arange(kept.numel())
    parts = (number[ids] for ids in split.parts.values())
    return Split(*(ids[ids >= 0] for ids in parts), source=split.source)


def row_normalized(data: NodeData) -> NodeData:
    """The features of each node divided by their sum, where that is above 1."""
    return replace(data, x=features.normalized_rows(data.x))


def random_split(
    y: Tensor,
    *,
    seed: int,
    labels_per_class: int,
    development: int,
    class_names: Sequence[str] | None = None,
) -> Split:
    """Draw a split as the paper's released code does (Shchur et al. 2018).

    Of `development` random nodes, `labels_per_class` of each class are for training and the rest
    for validation; all other nodes are the test set. Nodes with label −1 are in none. Equal seeds
    give equal splits. `class_names` are for messages.
    """
    labels = y.numpy()
    labelled = np.flatnonzero(labels >= 0)
    if development >= labelled.size:
        raise ValueError(
            f"data: a split with {development} nodes for training and validation needs more "
            f"nodes than that, got {labelled.size}. Choose a smaller `development`."
        )
    drawn = np.random.RandomState(seed).choice(labelled.size, development, replace=False)
    chosen = labelled[drawn]
    # The released code seeds a second time, so the same nodes as there are drawn
    random = np.random.RandomState(seed)
    train = []
    for label in range(labels.max() + 1):
        members = chosen[labels[chosen] == label]
        if members.size < labels_per_class:
            raise ValueError(
                f"data: `labels_per_class` must be at most {members.size}, the nodes of class "
                f"{class_names[label] if class_names else label} among {development} drawn with "
                f"seed {seed}, got {labels_per_class}. Choose fewer, or a larger `development`."
            )
        train.append(random.choice(members, labels_per_class, replace=False))
    train_ids = np.concatenate(train)
    val_ids = np.setdiff1d(chosen, train_ids)
    if val_ids.size == 0:
        raise ValueError(
            f"data: `labels_per_class` must leave nodes for validation, got {labels_per_class}, "
            f"which uses all of {development}."
        )
    test_ids = np.setdiff1d(labelled, chosen)
    return Split(*(torch.from_numpy(np.sort(ids)) for ids in (train_ids, val_ids, test_ids)))


def label_spreading_accuracy(data: NodeData, split: Split) -> float:
    """Test accuracy of scikit-learn's LabelSpreading on the same graph and training labels.

    Its `alpha`, which decides most of the result, is the one best on the validation nodes, as the
    model it is compared with is chosen.
    """
    from scipy.sparse import csr_matrix
    from sklearn.semi_supervised import LabelSpreading

    n = data.num_nodes
    adjacency = csr_matrix((np.ones(data.edge_index.shape[1]), data.edge_index.numpy()), (n, n))
    known = np.full(n, -1)
    known[split.train.numpy()] = data.y[split.train].numpy()
    results = []
    for alpha in _SPREADING_ALPHAS:
        model = LabelSpreading(kernel=lambda *_: adjacency, alpha=alpha, max_iter=1000)
        guess = torch.from_numpy(model.fit(data.x.to_dense().numpy(), known).transduction_)
        results.append([accuracy(guess, data.y, ids) for ids in (split.val, split.test)])
    return max(results, key=lambda result: result[0])[1]


def accuracy(guess: Tensor, y: Tensor, ids: Tensor) -> float:
    """Share of the nodes `ids` whose guessed class `[N]` is their label."""
    return float((guess[ids] == y[ids]).double().mean())


def _digits(neighbours: int) -> NodeData:
    """scikit-learn's 1,797 images of 8×8 pixels, each joined to its nearest in pixel space."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    bunch = load_digits()
    n = bunch.data.shape[0]
    if not 1 <= neighbours < n:
        raise ValueError(f"data: `neighbours` must lie in [1, {n - 1}], got {neighbours}.")
    x = (bunch.data / 16.0).astype(np.float32)  # pixels are 0…16
    nearest = kneighbors_graph(x, neighbours)
    edges = nearest.maximum(nearest.T).tocoo()  # joined if either is among the other's nearest
    edge_index = torch.from_numpy(np.stack([edges.row, edges.col]).astype(np.int64))
    y = torch.from_numpy(bunch.target.astype(np.int64))
    return NodeData("digits", torch.from_numpy(x), y, edge_index)
