"""The data of an experiment as its options ask: component, rewiring, normalisation, splits."""

from dataclasses import replace
from pathlib import Path

from grand_fast.data import public_files
from grand_fast.data.datasets import (
    NodeData,
    Split,
    largest_component,
    load,
    numbered_classes,
    random_split,
    row_normalized,
)
from grand_fast.data.features import compact, share_stored
from grand_fast.data.rewiring import diffusion_rewiring
from grand_fast.training.option_types import BadOptionError
from grand_fast.training.presets import Preset

_SHOWN_NAMES = 10


def prepared(
    dataset: str, preset: Preset, root: Path | None = None, own: NodeData | None = None
) -> NodeData:
    """The graph to train on; features that are mostly zeros are sparse.

    Args:
        dataset: one of `grand_fast.data.DATASETS`.
        preset: its options of the data.
        root: see `grand_fast.data.load`.
        own: a graph of the user's instead, whole.

    Raises:
        BadOptionError: options that do not fit. DataError: files missing or damaged.
    """
    try:
        data = own or load(dataset, root=root, neighbours=preset.neighbours)
        data = replace(data, x=compact(data.x))
        # The graphs of digits and of the user are as they were meant
        published = own is None and dataset != "digits"
        by_default = "largest" if published and preset.split == "random" else "all"
        if (preset.component or by_default) == "largest":
            data = numbered_classes(largest_component(data))
        if preset.rewiring is not None:
            if data.edge_weight is not None:
                raise BadOptionError(
                    f"{{--rewiring}} takes edges without weights, got {data.name}, which has some. "
                    f"Leave edge_weight out of the file."
                )
            edge_index, edge_weight = diffusion_rewiring(
                data.edge_index, data.num_nodes, kernel=preset.rewiring,
                alpha=preset.rewiring_alpha, t=preset.rewiring_t, top_k=preset.rewiring_top_k,
                threshold=preset.rewiring_threshold,
            )  # fmt: skip
            data = replace(data, edge_index=edge_index, edge_weight=edge_weight)
    except BadOptionError:
        raise
    except ValueError as error:
        raise BadOptionError(str(error)) from error
    return row_normalized(data) if preset.row_normalize else data


def splits_of(data: NodeData, preset: Preset, seeds: int) -> list[Split]:
    """The split of each seed.

    Raises:
        BadOptionError: the data have no such split.
    """
    planetoid = public_files.PLANETOID
    if preset.split == "planetoid" and data.name not in planetoid:
        raise BadOptionError(
            f"{{--split}} planetoid is published for {', '.join(planetoid[:-1])} and "
            f"{planetoid[-1]}, got {data.name}. Use {{--split}} random."
        )
    if preset.split != "random":
        if data.public_split is None:
            raise BadOptionError(
                f"{{--split}} {preset.split} needs a split that comes with the data, got "
                f"{data.name}, which has none. Use {{--split}} random."
            )
        for part, ids in data.public_split.parts.items():
            if ids.numel() == 0:
                raise BadOptionError(
                    f"{{--component}} largest must hold nodes of each part of the split, got none "
                    f"for {part}. Use {{--component}} all."
                )
        return [data.public_split] * seeds
    try:
        return [
            random_split(
                data.y,
                seed=seed,
                labels_per_class=preset.labels_per_class,
                development=preset.development,
                class_names=data.class_names,
            )
            for seed in range(seeds)
        ]
    except ValueError as error:
        options = "The options are {--labels_per_class} and {--development}."
        raise BadOptionError(f"{error} {options}") from error


def describe(data: NodeData, split: Split, preset: Preset) -> str:
    """One line about the graph and a split."""
    share = share_stored(data.x)
    stored = "" if share == 1 else f" ({100 * share:.2g} % of them nonzero, kept sparse)"
    return (
        f"{data.name}: {data.num_nodes:,} nodes, {data.edge_index.shape[1]:,} directed edges, "
        f"{data.x.shape[1]:,} features{stored}, {data.num_classes} classes"
        f"{f', rewired by {preset.rewiring}' if preset.rewiring else ''}; {preset.split} split, "
        f"{split.train.numel()} / {split.val.numel()} / {split.test.numel()} nodes for "
        f"training / validation / test"
    )


def remarks(data: NodeData, preset: Preset) -> list[str]:
    """Lines about what was made of a user's file: its split, its classes, what was not read."""
    lines = []
    if data.public_split is not None and data.public_split.source:
        unused = "" if preset.split != "random" else " is not used: --split random"
        lines.append(f"split: {data.public_split.source}{unused}")
    if (names := data.class_names) is not None:
        shown = names if len(names) <= _SHOWN_NAMES else (*names[:_SHOWN_NAMES], "...")
        numbers = f"0 to {len(names) - 1}, in that order"
        lines.append(f"classes: {', '.join(shown)} in y, trained as {numbers}")
    if data.unread:
        lines.append(f"not used: {', '.join(data.unread)} of {data.name}")
    return lines
