"""The options of `python -m bench paper`; nothing heavy is imported for them."""

import argparse
from pathlib import Path

from grand_fast.training.option_types import number, one_of

PARTS = ("table1", "table2", "depth", "solvers", "rewiring", "superpixels", "parameters")
DATASETS = ("Cora", "CiteSeer", "PubMed", "CoauthorCS", "Computers", "Photo", "ogbn-arxiv")
MODELS = ("GRAND-l", "GRAND-nl", "GRAND-nl-rw", "GCN", "GAT", "MoNet", "GS-mean", "GS-maxpool")
COMPONENTS = ("largest", "all")
FOLDER = Path("bench/results/paper")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this suite takes beside the options of all."""
    parser.add_argument(
        "--part",
        type=one_of(PARTS),
        metavar="|".join(PARTS),
        help="one of the seven (default: all)",
    )
    parser.add_argument(
        "--budget", type=number(float, above=0), metavar="SECONDS",
        help="that each part may take (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=number(int, low=1), metavar="N",
        help="runs of each model (default: 20 in table1, 10 in table2, 3 elsewhere)",
    )  # fmt: skip
    parser.add_argument(
        "--datasets",
        type=one_of(DATASETS),
        nargs="+",
        metavar="NAME",
        help=f"of the tables and of parameters, some of {', '.join(DATASETS)} (default: all, in "
        "tables without ogbn-arxiv)",
    )
    parser.add_argument(
        "--models",
        type=one_of(MODELS),
        nargs="+",
        metavar="NAME",
        help=f"of the tables, some of {', '.join(MODELS)} (default: all of a table)",
    )
    parser.add_argument(
        "--component", type=one_of(COMPONENTS), default="largest", metavar="|".join(COMPONENTS),
        help="of table1: the largest connected component, which the paper says it uses, with what "
        "lies in it of the published split, or all of the graph (default: largest)",
    )  # fmt: skip
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the runs that OUT holds (default), or start again",
    )
    parser.set_defaults(graph="tuned", out=FOLDER)
