"""Jobs and finished runs of the suite `paper`, for its tests."""

import argparse
from dataclasses import replace

from bench.paper.jobs import Job
from grand_fast.training.presets import Preset

SMALL = Preset(hidden=8, heads=2, attention_channels=8, T=2.0, epochs=3, development=400,
               labels_per_class=10)  # fmt: skip
HEADER = {"commit": "abc"}
OPTIONS = argparse.Namespace(seeds=2, datasets=None, models=None, budget=None, resume=True,
                             component="largest")  # fmt: skip


def small_job(model="GRAND-nl", seed=0, **changes):
    return Job("digits", model, seed, replace(SMALL, **changes))


def run_row(model="GRAND-l", seed=0, accuracy=0.8, at=None, dataset="Cora", diverged=False):
    return {
        "dataset": dataset, "model": model, "at": at, "seed": seed, "options": {},
        "test_accuracy": accuracy, "seconds_per_epoch": 0.5, "nfe_forward": 12, "alpha": 0.5,
        "diverged": diverged, "stopped": "NON_FINITE" if diverged else None,
    }  # fmt: skip
