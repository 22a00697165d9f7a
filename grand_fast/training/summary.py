"""The figures of an experiment, as JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grand_fast.training.checkpoint import write_file
from grand_fast.training.environment import peak_memory_bytes, versions
from grand_fast.training.experiment import Experiment, Results


def summary(experiment: Experiment, results: Results) -> dict[str, Any]:
    """What `--json` writes: accuracies, seconds, bytes and versions."""
    preset, runs = experiment.preset, results.runs
    spread = results.label_spreading
    memory = [epoch.peak_memory_bytes for run in runs for epoch in run.history]
    return {
        "dataset": experiment.dataset,
        "variant": preset.variant,
        "method": preset.method,
        "seeds": experiment.seeds,
        **_mean_std([run.test_accuracy for run in runs]),
        "seconds_per_epoch": float(np.median([run.seconds_per_epoch for run in runs])),
        "nfe_forward": runs[-1].best.nfe,
        "nfe_backward": runs[-1].best.nfe_backward,
        "peak_memory_bytes": max([peak_memory_bytes(experiment.device), *memory]),
        "parameters": results.parameters,
        "versions": versions(),
        "val_accuracy": [run.best.val_accuracy for run in runs],
        "best_time": [run.best.time for run in runs],
        "label_spreading": _mean_std(spread) if spread else None,
        "classes": None if results.classes is None else list(results.classes),
        "device": str(experiment.device),
        "threads": torch.get_num_threads(),
        "options": preset.options(),
    }


def write_summary(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, making the folder if it is missing.

    Raises:
        WriteError: there is no room, or no permission.
    """
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def _mean_std(values: list[float]) -> dict[str, Any]:
    """Mean and population standard deviation, as the paper's released code reports."""
    return {
        "test_accuracy": values,
        "mean": float(np.mean(values)),
        "std": float(np.std(values)),
    }
