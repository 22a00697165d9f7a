"""The options of `python -m bench models`; nothing heavy is imported for them."""

import argparse

from grand_fast.training.option_types import one_of

DATASETS = ("Cora", "PubMed", "CoauthorCS", "Computers", "ogbn-arxiv")
VARIANTS = ("nl", "l")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this suite takes beside the options of all."""
    parser.add_argument("--dataset", type=one_of(DATASETS), metavar="|".join(DATASETS),
                        help="one of them (default: all)")  # fmt: skip
    parser.add_argument("--variant", type=one_of(VARIANTS), metavar="|".join(VARIANTS),
                        help="one of them (default: both; ogbn-arxiv: nl)")  # fmt: skip
    parser.set_defaults(graph="tuned")
