"""The configuration that the paper's released code tuned for each data set, and its graph."""

from dataclasses import dataclass
from pathlib import Path

from bench.core import graphs
from bench.core.problem import Shape
from grand_fast import Graph
from grand_fast.data.datasets import largest_component, load
from grand_fast.data.public_files import DataError
from grand_fast.training.configurations import FOLDER, RELEASED, configuration

ARXIV = "ogbn-arxiv"


@dataclass(frozen=True)
class Configuration:
    """What the attention of one data set is.

    dataset: a name of `grand_fast.data`, or "ogbn-arxiv".
    score, normalizer, normalize: as the layer `AttentionDiffusion` takes them.
    source: whether `beta x0` is added.
    self_loops: weight of the loop appended to each node; None for no loops.
    """

    dataset: str
    shape: Shape
    score: str = "scaled_dot"
    normalizer: str = "softmax"
    normalize: str = "receiver"
    source: bool = False
    self_loops: float | None = 1.0

    def __str__(self) -> str:
        direction = "" if self.normalize == "receiver" else " by sender"
        source = " + source" if self.source else ""
        return f"{self.dataset} {self.shape} {self.score} {self.normalizer}{direction}{source}"


def _of_file(dataset: str, folder: Path = RELEASED) -> Configuration:
    """That of the model which trains by a file."""
    preset = configuration(dataset, "nl", folder)
    shape = Shape(preset.hidden, preset.heads, preset.attention_channels)
    options = ("score", "normalizer", "normalize", "source", "self_loops")
    return Configuration(dataset, shape, *(getattr(preset, name) for name in options))


# Of CiteSeer and Photo there is no file with all that the released code tuned
CONFIGURATIONS = (
    _of_file("Cora"),
    Configuration("CiteSeer", Shape(80, 8, 32), score="exp_kernel", normalizer="squareplus",
                  normalize="sender", source=True),
    _of_file("PubMed"),
    _of_file("CoauthorCS"),
    _of_file("Computers"),
    Configuration("Photo", Shape(64, 4, 64), score="pearson", self_loops=0.058),
    _of_file(ARXIV, FOLDER),
)  # fmt: skip
BY_DATASET = {configuration.dataset: configuration for configuration in CONFIGURATIONS}


def load_graph(configuration: Configuration) -> Graph:
    """The largest component of the real graph, as the released code takes it, loops appended.

    Row 0 of the edge index receives, as there.

    Raises:
        ValueError: files are missing; how to get them.
    """
    if configuration.dataset == ARXIV:
        edges = graphs.load("arxiv").edge_index()
        edges = edges[:, edges[0] != edges[1]].flip(0)
        n = graphs.ARXIV_NODES
    else:
        try:
            data = largest_component(load(configuration.dataset))
        except DataError as missing:
            raise ValueError(str(missing)) from missing
        edges, n = data.edge_index, data.num_nodes
    loops = configuration.self_loops
    return Graph.from_edge_index(edges, n, flow="target_to_source", self_loops=loops)
