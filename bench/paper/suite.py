"""The suite `paper`: its parts, each within a budget and resumed where the last call stopped."""

import argparse
from collections.abc import Collection
from pathlib import Path

from bench.core.harness import Budget
from bench.core.options import PAPER_PARTS
from bench.core.report import Report
from bench.paper import accuracy, depth, parameters, superpixels, sweeps
from bench.paper.jobs import work
from bench.paper.published import FEATURES_CLASSES
from bench.paper.store import Store, write_json
from grand_fast.data.public_files import DataError

EPILOG = """\
Seven parts, of which --part chooses one:

table1       Planetoid split, 20 initialisations: GRAND-l, -nl, -nl-rw and PyG's GCN, GAT, MoNet and
             GraphSAGE, on Cora, CiteSeer and PubMed
table2       10 random splits: the same on CoauthorCS, Computers and Photo too, and on the split of
             ogbn-arxiv where --datasets names it (hours)
depth        figure 2: Cora, RK4 with steps of 1 to T = 1 ... 64 against GCN with as many layers
solvers      figure 3, left: accuracy and time over the step size of explicit and implicit Adams and
             semi-implicit Euler, and DOPRI5
rewiring     figure 3, right: the same over K, the edges that rewiring keeps of each node
superpixels  figure 4: an image as a graph of superpixels under GRAND-nl and a constant Laplacian
parameters   of every configuration

Configurations are those of grand-fast train; the data are read from $GRAND_FAST_DATA. Each
finished run is added to OUT/PART.json at once, and a second call goes on with what is missing, or
whose configuration has changed. OUT is bench/results/paper, where the runs of the main README are,
unless --out says otherwise; pictures go there too. --budget ends a part after as many seconds; the
run that it interrupts goes on from its last epoch. The last two parts take seconds. Try:
python -m bench paper --part table1 --datasets Cora --seeds 2 --budget 600 --out mine
"""


# How a part's training runs are made, shown and drawn
TRAINED = {"table1": accuracy, "table2": accuracy, "depth": depth, "solvers": sweeps,
           "rewiring": sweeps}  # fmt: skip
OTHERS = {"superpixels": superpixels.run, "parameters": parameters.run}


def run(options: argparse.Namespace, report: Report) -> None:
    """Train what is missing, print the tables as they come, draw, and fill `report`.

    Raises:
        ValueError: options of which the part has no use; files of a data set or of earlier runs
            that are missing or damaged; what to do.
    """
    _check(options)
    folder: Path = options.out
    report.saved = f"every run that was finished to {folder}"
    for part in [options.part] if options.part else PAPER_PARTS:
        try:
            if part in OTHERS:
                rows = OTHERS[part](options, report, folder)
                report.rows += [{"part": part, **row} for row in rows]
                write_json(folder / f"{part}.json", {"header": report.header, "rows": rows})
            else:
                _train(part, options, report, folder)
        except DataError as missing:
            raise ValueError(str(missing)) from missing


def _check(options: argparse.Namespace) -> None:
    """A part that is asked for has the data sets and models that are."""
    part = options.part
    known: dict[str, Collection[str]] = {}
    if part in accuracy.DATASETS:
        known = {"datasets": accuracy.DATASETS[part], "models": accuracy.models(part)}
    elif part == "parameters":
        known = {"datasets": FEATURES_CLASSES}
    for option in ("datasets", "models") if part else ():
        names = known.get(option, ())
        for name in getattr(options, option) or ():
            if not names:
                raise ValueError(f"--{option} is not used by --part {part}.")
            if name not in names:
                own = ", ".join(names)
                raise ValueError(f"--{option}: must be of --part {part}, {own}, got {name}.")


def _train(part: str, options: argparse.Namespace, report: Report, folder: Path) -> None:
    chosen = TRAINED[part]
    jobs = chosen.jobs(part, options)
    if not jobs:
        report.skipped.append(f"{part}: it has none of the data sets and models asked for.")
        return
    store = Store(folder / f"{part}.json", report.header, resume=options.resume)
    runs = work(jobs, store, Budget(options.budget))
    if len(runs) < len(jobs):
        report.skipped.append(
            f"{part}: {len(jobs) - len(runs)} of {len(jobs)} runs are still to be made: the budget "
            "was over. The same command goes on."
        )
    if runs:
        chosen.show(part, runs, jobs, report)
        chosen.draw(part, runs, jobs, folder / f"{part}.png")
