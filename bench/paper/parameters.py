"""Parameters of every configuration, beside the counts that the paper gives."""

import argparse
from pathlib import Path

import torch

from bench.core.report import Report
from bench.core.setting import grand
from bench.core.tables import Column, Row, cell, print_rows
from bench.paper.peers import PEERS, build, peer_preset
from bench.paper.published import ARXIV_PARAMETERS, FEATURES_CLASSES
from grand_fast.data.datasets import NodeData
from grand_fast.training.configurations import configuration, configurations

COLUMNS: list[Column] = [
    ("", cell("model")),
    ("encoder", cell("encoder", "{:,}")),
    ("diffusion", cell("diffusion", "{:,}")),
    ("decoder", cell("decoder", "{:,}")),
    ("all", cell("parameters", "{:,}")),
    ("paper", cell("paper", "{:,}")),
    ("difference", lambda r: "" if r["paper"] is None else f"{r['parameters'] - r['paper']:+,}"),
]


def run(options: argparse.Namespace, report: Report, folder: Path) -> list[Row]:
    """Count, without data: sizes of features and classes are those of table 3."""
    datasets = options.datasets or list(FEATURES_CLASSES)
    rows: list[Row] = []
    for dataset in datasets:
        own = [variant for name, variant in configurations() if name == dataset]
        here = [count(dataset, variant) for variant in own]
        here += [count_peer(dataset, own[0], peer) for peer in PEERS if peer != "GCN-residual"]
        print_rows(f"parameters, {dataset}", here, COLUMNS)
        rows += here
    return rows


def count(dataset: str, variant: str) -> Row:
    """Of a configuration: parameters by module."""
    model = grand(_sizes(dataset), configuration(dataset, variant))
    parts = {name: sum(p.numel() for p in module.parameters())
             for name, module in model.named_children()}  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    decoder, diffusion = parts.get("decoder", 0), parts["field"]
    return {
        "dataset": dataset,
        "model": f"GRAND-{variant}",
        "encoder": total - diffusion - decoder,
        "diffusion": diffusion,
        "decoder": decoder,
        "parameters": total,
        "paper": ARXIV_PARAMETERS["GRAND"] if dataset == "ogbn-arxiv" else None,
    }


def count_peer(dataset: str, variant: str, peer: str) -> Row:
    """Of a peer as the tables run it; the paper's peers on ogbn-arxiv are larger ones."""
    preset = peer_preset(peer, configuration(dataset, variant))
    model = build(peer, _sizes(dataset), preset)
    paper = ARXIV_PARAMETERS.get(peer) if dataset == "ogbn-arxiv" else None
    total = sum(p.numel() for p in model.parameters())
    return {"dataset": dataset, "model": peer, "parameters": total, "paper": paper}


def _sizes(dataset: str) -> NodeData:
    """Two nodes and one edge, with the features and classes of the data set."""
    features, classes = FEATURES_CLASSES[dataset]
    labels = torch.tensor([0, classes - 1])
    return NodeData(dataset, torch.zeros(2, features), labels, torch.tensor([[0, 1], [1, 0]]))
