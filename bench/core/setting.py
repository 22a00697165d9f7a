"""The data of a configuration, ready for training: features, graph and split; and its model."""

from dataclasses import dataclass, replace
from functools import lru_cache

from grand_fast import Graph
from grand_fast.data.datasets import NodeData, Split
from grand_fast.nn import GRAND
from grand_fast.training.prepare import prepared, splits_of
from grand_fast.training.presets import OPTIONS, Preset, model_config

NOT_REWIRED = {name: getattr(Preset(), name) for name in (
    "rewiring", "rewiring_top_k", "rewiring_threshold", "rewiring_alpha", "rewiring_t"
)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Setting:
    """What a training run is given."""

    data: NodeData
    graph: Graph
    split: Split


def setting(dataset: str, preset: Preset, seed: int) -> Setting:
    """Data, graph and the split of this seed, as `grand-fast train` makes them.

    Raises:
        DataError: files are missing or damaged; how to get them.
    """
    names = [name for name, field in OPTIONS.items() if field.metadata["group"] == "data"]
    of_data = replace(Preset(), **{name: getattr(preset, name) for name in names})
    data, graph = _prepared(dataset, of_data)
    return Setting(data, graph, splits_of(data, of_data, seed + 1)[seed])


def grand(data: NodeData, preset: Preset) -> GRAND:
    """The model of a configuration, with random weights."""
    return GRAND(**model_config(data, preset))


@lru_cache(maxsize=12)  # rewiring takes a minute, and the jobs of a table go round the data sets
def _prepared(dataset: str, preset: Preset) -> tuple[NodeData, Graph]:
    data = prepared(dataset, preset)
    if preset.rewiring is not None:  # then one copy of the features is enough
        given, _ = _prepared(dataset, replace(preset, **NOT_REWIRED))
        data = replace(data, x=given.x)
    graph = Graph.from_edge_index(
        data.edge_index, data.num_nodes, data.edge_weight, self_loops=preset.self_loops
    )
    return data, graph
