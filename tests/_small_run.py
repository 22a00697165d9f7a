"""A run of seconds, for the tests of its folder and of its being stopped."""

import csv

import torch

from grand_fast.data.datasets import NodeData, Split
from grand_fast.training.checkpoint import WEIGHTS_FILE
from grand_fast.training.experiment import Experiment
from grand_fast.training.history import METRICS_FILE
from grand_fast.training.presets import Preset

N = 60
SMALL = Preset(
    split="public", hidden=8, heads=2, attention_channels=8, T=1.0, epochs=2, dropout=0.3,
    batch_norm=True, use_labels=True,
)  # fmt: skip
MEASURED = ("seconds", "peak_memory_bytes")  # differ between equal runs


def two_rings():
    ids = torch.arange(N)
    half = N // 2
    ring = ids // half * half + (ids + 1) % half
    edges = torch.cat([torch.stack([ids, ring]), torch.stack([ring, ids])], dim=1)
    y = ids // half
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)) + y[:, None]
    split = Split(ids[::6], ids[1::6], torch.cat([ids[k::6] for k in (2, 3, 4, 5)]))
    return NodeData("rings", x, y, edges, split)


def values(run):
    return [(e.loss, e.val_loss, e.val_accuracy, e.nfe, e.nfe_backward, e.time)
            for e in run.history]  # fmt: skip


def experiment(out, **more):
    own = two_rings()
    settings = {"preset": SMALL, "seeds": 2, "device": torch.device("cpu"), "out": out, "data": own}
    return Experiment("rings", **(settings | more))


def results_of(folder):
    """What two equal runs leave alike."""
    with open(folder / METRICS_FILE, newline="") as stream:
        rows = [{k: v for k, v in row.items() if k not in MEASURED}
                for row in csv.DictReader(stream)]  # fmt: skip
    return (folder / WEIGHTS_FILE).read_bytes(), (folder / "config.json").read_bytes(), rows


def silent(line):
    pass
