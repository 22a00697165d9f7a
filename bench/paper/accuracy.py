"""Tables 1 and 2: test accuracies beside the paper's, and the peers in the same protocol."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.core.report import Report
from bench.core.tables import Row, print_table
from bench.paper.comparison import HEAD, Comparison, compare
from bench.paper.figures import draw_accuracies
from bench.paper.jobs import Job
from bench.paper.peers import peer_preset
from bench.paper.published import GRAND_MODELS, PLANETOID, TABLE1, TABLE2
from grand_fast.training.configurations import configuration
from grand_fast.training.presets import Preset

ARXIV = "ogbn-arxiv"  # has a split of its own; takes hours, so it runs only where it is named
# Peers of each table's rows; a random split of table 2 also draws the initialisation.
SPLITS = {"table1": "planetoid", "table2": "random"}
PUBLISHED = {"table1": TABLE1, "table2": TABLE2}
DATASETS = {"table1": PLANETOID, "table2": (*PLANETOID, "CoauthorCS", "Computers", "Photo", ARXIV)}
TABLE_PEERS = {
    "table1": ("GCN", "GAT", "MoNet", "GS-maxpool"),
    "table2": ("GCN", "GAT", "MoNet", "GS-mean", "GS-maxpool"),
}
SEEDS = {"table1": 20, "table2": 10}
PROTOCOL = {
    "table1": "published Planetoid splits, graph: {component} component; initialisations: {seeds} "
    "(the paper: 20, largest component)",
    "table2": "random splits of the largest component, 20 labels a class, one initialisation each: "
    "{seeds} (the paper: 100 splits, 20 initialisations)",
}


def jobs(part: str, options: argparse.Namespace) -> list[Job]:
    """All runs of a table, seed by seed, so that a short budget leaves some of each."""
    named = options.datasets or [name for name in DATASETS[part] if name != ARXIV]
    presets: dict[tuple[str, str], Preset] = {}
    for dataset in [name for name in DATASETS[part] if name in named]:
        for model in GRAND_MODELS:
            preset = configuration(dataset, model.removeprefix("GRAND-"))
            component = options.component if part == "table1" else None
            split = preset.split if dataset == ARXIV else SPLITS[part]
            presets[dataset, model] = replace(preset, split=split, component=component)
        for peer in TABLE_PEERS[part]:
            presets[dataset, peer] = peer_preset(peer, presets[dataset, GRAND_MODELS[0]])
    return [
        Job(dataset, model, seed, preset)
        for seed in range(options.seeds or SEEDS[part])
        for (dataset, model), preset in presets.items()
        if model in (options.models or models(part))
    ]


def models(part: str) -> tuple[str, ...]:
    """Of a table, in its order."""
    return (*GRAND_MODELS, *TABLE_PEERS[part])


def comparisons(part: str, runs: Sequence[Row], wanted: Sequence[Job]) -> list[Comparison]:
    """One for each model and data set of the jobs, and those rows of the paper that we do not run.

    The order is the table's.
    """
    published = PUBLISHED[part]
    result = []
    for dataset in dict.fromkeys(job.dataset for job in wanted):
        ran = dict.fromkeys(job.model for job in wanted if job.dataset == dataset)
        models = dict.fromkeys([*published[dataset], *ran])
        peers = [model for model in models if model not in GRAND_MODELS]
        ordered = [*peers, *(model for model in GRAND_MODELS if model in models)]
        result += [compare(dataset, model, published[dataset], runs) for model in ordered]
    return result


def show(part: str, runs: Sequence[Row], wanted: Sequence[Job], report: Report) -> None:
    """Print the table of each data set, and add its figures to `report`."""
    found = comparisons(part, runs, wanted)
    seeds, component = len({job.seed for job in wanted}), wanted[0].preset.component
    protocol = PROTOCOL[part].format(seeds=seeds, component=component)
    print(
        f"\n{part}: {protocol}; test accuracy in percent of the epoch that is best in validation."
    )
    for dataset in dict.fromkeys(item.dataset for item in found):
        here = [item for item in found if item.dataset == dataset]
        print_table(f"{part}, {dataset}", HEAD, [item.cells() for item in here])
        _figures(part, here, report)
    text = "{dataset} {model} seed {seed}: ended early, its best epoch counts: {stopped}"
    report.skipped += [text.format(**run) for run in runs if run["diverged"]]
    report.rows += [{"part": part, **vars(item), "difference": item.difference} for item in found]


def _figures(part: str, here: list[Comparison], report: Report) -> None:
    own = [item for item in here if item.model in GRAND_MODELS and item.ours]
    for item in own:
        name = f"{part} {item.dataset}: {item.model} less the paper's"
        report.figure(name, item.difference, "points")
    paper = [item.paper[0] for item in here if item.model in GRAND_MODELS and item.paper]
    if len(own) == len(GRAND_MODELS) and paper:
        best = max(item.ours[0] for item in own if item.ours)
        name = f"{part} {here[0].dataset}: best variant less the paper's best"
        report.figure(name, best - max(paper), "points")


def draw(part: str, runs: Sequence[Row], wanted: Sequence[Job], path: Path) -> None:
    """Points with one standard deviation, the paper's and ours side by side."""
    draw_accuracies(comparisons(part, runs, wanted), path, title=part)
