"""A training run: what it is, what it came to, and the lines and the JSON that tell it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grand_fast.data.datasets import NodeData, fingerprint
from grand_fast.ops.backends import Backend
from grand_fast.solvers import ADAPTIVE
from grand_fast.training.checkpoint import write_file
from grand_fast.training.environment import peak_memory_bytes, versions
from grand_fast.training.presets import Preset
from grand_fast.training.trainer import Fit


@dataclass(frozen=True, eq=False)
class Experiment:
    """What to train, and where the results go.

    Attributes:
        dataset: one of `grand_fast.data.DATASETS`, or the name of `data`.
        preset: options of data, model and training.
        seeds: runs with seeds 0, 1, …; a seed draws the weights and a random split.
        device, backend: where to train, and by which operators.
        out: folder of the run: the weights and the picture of what is best in validation, the
            metrics of all epochs, and what a stopped run needs to go on.
        root: folder of the data sets, see `grand_fast.data.load`.
        data: a graph of the user's instead, used whole.
        restart: begin anew where `out` holds a run, which is deleted.
        sources: files that the options come from, told first; of two the second wins.
    """

    dataset: str
    preset: Preset
    seeds: int
    device: torch.device
    out: Path
    root: Path | None = None
    data: NodeData | None = None
    backend: Backend = "auto"
    restart: bool = False
    sources: Sequence[Path] = ()

    @property
    def configuration(self) -> dict[str, Any]:
        """What decides the results of a seed: two runs with equal ones are the same run."""
        found = versions()
        return {
            "dataset": self.dataset,
            "data": None if self.data is None else fingerprint(self.data),
            **self.preset.options(),
            "device": self.device.type,
            "backend": self.backend if self.backend != "auto" else default_backend() or "auto",
            "versions": {name: found[name] for name in ("grand_fast", "torch")},
        }


@dataclass(eq=False)
class Results:
    """What `run_seeds` reached.

    Attributes:
        runs: those that ended, in the order of their seeds.
        label_spreading: its test accuracy on each one's labels (digits).
        parameters: of the model, a number.
        classes: the names of the classes 0, 1, … if they have any but their numbers.
        stopped: None, or why the runs ended early.
        saved_seed: the seed whose weights lie in the folder, of those trained there with this
            command and earlier ones; None where there are none.
    """

    runs: list[Fit] = field(default_factory=list)
    label_spreading: list[float] = field(default_factory=list)
    parameters: int = 0
    classes: Sequence[str] | None = None
    stopped: str | None = None
    saved_seed: int | None = None


def figures(seed: int, run: Fit) -> str:
    """One line about a seed that ended."""
    return (
        f"seed {seed}: test accuracy {run.test_accuracy:.4f}, validation "
        f"{run.best.val_accuracy:.4f} at epoch {run.best_epoch}; "
        f"{run.seconds_per_epoch:.3f} s an epoch, {run.best.nfe} evaluations of f"
    )


def describe_model(preset: Preset, parameters: int, device: torch.device) -> str:
    """One line about the model and its solve."""
    name = default_backend()
    chosen = f", GRAND_FAST_BACKEND={name}" if name else ""
    return (
        f"GRAND-{preset.variant}: {parameters:,} parameters, {preset.method} {_steps(preset)} "
        f"to T = {preset.T:g}; on {device}, "
        f"{torch.get_num_threads()} threads{chosen}"
    )


def default_backend() -> str | None:
    """What the environment says, in place of auto."""
    return os.environ.get("GRAND_FAST_BACKEND")


def _steps(preset: Preset) -> str:
    if preset.method not in ADAPTIVE:
        return "in one step" if preset.step_size is None else f"with steps of {preset.step_size:g}"
    given = {"rtol": preset.rtol, "atol": preset.atol, "tol_scale": preset.tol_scale}
    named = [f"{name} = {value:g}" for name, value in given.items() if value is not None]
    return f"with {' and '.join(named) or 'default tolerances'}"


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
    return {"test_accuracy": values, "mean": float(np.mean(values)), "std": float(np.std(values))}
