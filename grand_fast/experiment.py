"""`grand-fast train`: some seeds of one model on one data set, and their summary."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grand_fast.data import (
    NodeData,
    Split,
    label_spreading_accuracy,
    largest_component,
    load,
    random_split,
    row_normalized,
)
from grand_fast.graph import Graph
from grand_fast.info import peak_memory_bytes, versions
from grand_fast.nn import GRAND
from grand_fast.presets import Preset
from grand_fast.solvers import ADAPTIVE
from grand_fast.train import Fit, fit, save_checkpoint

CURVES_FILE = "curves.png"


class BadOptionError(ValueError):
    """Options that do not fit each other or the data."""


class NotWritableError(RuntimeError):
    """A place for results cannot be written."""


@dataclass(frozen=True)
class Experiment:
    """What to train, and where the results go.

    Attributes:
        dataset: one of `grand_fast.data.DATASETS`.
        preset: options of data, model and training.
        seeds: runs with seeds 0, 1, …; a seed draws the weights and a random split.
        device: where to train.
        out: folder of the checkpoint and the picture, those of the best validation accuracy.
        root: folder of the data sets, see `grand_fast.data.load`.
    """

    dataset: str
    preset: Preset
    seeds: int
    device: torch.device
    out: Path
    root: Path | None = None


@dataclass(eq=False)
class Results:
    """The runs that ended, and label spreading's test accuracy on each one's labels (digits)."""

    runs: list[Fit] = field(default_factory=list)
    label_spreading: list[float] = field(default_factory=list)
    parameters: int = 0
    stopped: str | None = None
    saved: Fit | None = None


def run_seeds(experiment: Experiment, say: Callable[[str], None]) -> Results:
    """Train every seed, saving the best weights and their curves after each.

    Args:
        experiment: what to train.
        say: takes lines for the user.

    Raises:
        BadOptionError: options that do not fit. DataError: files missing or damaged.

    An interrupt or a failed solve ends the runs: `Results.stopped` tells.
    """
    preset = experiment.preset
    data = _data(experiment)
    splits = _splits(data, experiment)
    config = model_config(data, preset)
    graph = Graph.from_edge_index(data.edge_index, data.num_nodes, self_loops=preset.self_loops)
    on_device = replace(data, x=data.x.to(experiment.device), y=data.y.to(experiment.device))
    graph = graph.to(experiment.device)

    results = Results()
    say(_describe_data(data, splits[0], preset))
    for seed, split in enumerate(splits):
        torch.manual_seed(seed)
        model = _model(config).to(experiment.device)
        if seed == 0:
            results.parameters = sum(p.numel() for p in model.parameters())
            say(_describe_model(preset, results.parameters, experiment.device))
        try:
            run = fit(
                model,
                on_device,
                graph,
                split,
                epochs=preset.epochs,
                lr=preset.lr,
                weight_decay=preset.weight_decay,
                optimizer=preset.optimizer,
                label=f"seed {seed}",
            )
        except (TypeError, ValueError) as error:
            if str(error).startswith("integrate: "):  # all it was given are options
                raise BadOptionError(str(error)) from error
            raise
        _keep_if_best(results, run, seed, config, experiment)
        if run.stopped is not None:
            results.stopped = run.stopped
            break
        results.runs.append(run)
        say(
            f"seed {seed}: test accuracy {run.test_accuracy:.4f}, validation "
            f"{run.best.val_accuracy:.4f} at epoch {run.best_epoch}; "
            f"{run.seconds_per_epoch:.3f} s an epoch, {run.best.nfe} evaluations of f"
        )
        if data.name == "digits":
            results.label_spreading.append(label_spreading_accuracy(data, split))
    return results


def summary(experiment: Experiment, results: Results) -> dict[str, Any]:
    """What `--json` writes: accuracies, seconds, bytes and versions."""
    preset, runs = experiment.preset, results.runs
    spread = results.label_spreading
    return {
        "dataset": experiment.dataset,
        "variant": preset.variant,
        "method": preset.method,
        "seeds": experiment.seeds,
        **_mean_std([run.test_accuracy for run in runs]),
        "seconds_per_epoch": float(np.median([run.seconds_per_epoch for run in runs])),
        "nfe_forward": runs[-1].best.nfe,
        "nfe_backward": runs[-1].best.nfe_backward,
        "peak_memory_bytes": peak_memory_bytes(experiment.device),
        "parameters": results.parameters,
        "versions": versions(),
        "val_accuracy": [run.best.val_accuracy for run in runs],
        "label_spreading": _mean_std(spread) if spread else None,
        "device": str(experiment.device),
        "threads": torch.get_num_threads(),
        "options": asdict(preset),
    }


def write_summary(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, making the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def check_writable(folder: Path, option: str) -> None:
    """Fail early if `folder` cannot be written to, or be made.

    Raises:
        NotWritableError: names the option and the path.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotWritableError(
            f"{option} must be a place that can be written, got {folder}: {reason}. Choose another."
        ) from error


def model_config(data: NodeData, preset: Preset) -> dict[str, Any]:
    """The arguments of `GRAND`."""
    return {
        "in_channels": data.x.shape[1],
        "hidden_channels": preset.hidden,
        "out_channels": data.num_classes,
        "variant": preset.variant,
        "heads": preset.heads,
        "attention_channels": preset.attention_channels,
        "T": preset.T,
        "method": preset.method,
        "step_size": preset.step_size,
        "rtol": preset.rtol,
        "atol": preset.atol,
        "tol_scale": preset.tol_scale,
        "adjoint": preset.adjoint,
        "tol_scale_adjoint": preset.tol_scale_adjoint,
        "memory_limit": preset.memory_limit,
        "dropout": preset.dropout,
        "input_dropout": preset.input_dropout,
        "source": preset.source,
    }


def _model(config: dict[str, Any]) -> GRAND:
    try:
        return GRAND(**config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BadOptionError(str(error)) from error


def _data(experiment: Experiment) -> NodeData:
    preset = experiment.preset
    try:
        data = load(experiment.dataset, root=experiment.root, neighbours=preset.neighbours)
    except ValueError as error:
        raise BadOptionError(str(error)) from error
    # The graph of digits is our own choice: all its images stay
    if preset.split == "random" and data.name != "digits":
        data = largest_component(data)
    return row_normalized(data) if preset.row_normalize else data


def _splits(data: NodeData, experiment: Experiment) -> list[Split]:
    preset = experiment.preset
    if preset.split == "planetoid":
        if data.public_split is None:
            raise BadOptionError(
                f"--split planetoid is published for Cora, CiteSeer and PubMed, got "
                f"{data.name}. Use --split random."
            )
        return [data.public_split] * experiment.seeds
    try:
        return [
            random_split(
                data.y,
                seed=seed,
                labels_per_class=preset.labels_per_class,
                development=preset.development,
            )
            for seed in range(experiment.seeds)
        ]
    except ValueError as error:
        raise BadOptionError(str(error)) from error


def _keep_if_best(
    results: Results, run: Fit, seed: int, config: dict[str, Any], experiment: Experiment
) -> None:
    if not run.weights:
        return
    if results.saved is not None and run.best.val_accuracy <= results.saved.best.val_accuracy:
        return
    from grand_fast.plots import draw_training_curves

    about = {
        "model": config,
        "dataset": experiment.dataset,
        "options": asdict(experiment.preset),
        "seed": seed,
        "epoch": run.best_epoch,
        "val_accuracy": run.best.val_accuracy,
        "test_accuracy": run.test_accuracy,
        "versions": versions(),
    }
    save_checkpoint(experiment.out, run.weights, about)
    results.saved = run
    title = f"GRAND-{experiment.preset.variant} on {experiment.dataset}, seed {seed}"
    draw_training_curves(run, experiment.out / CURVES_FILE, title=title)


def _describe_data(data: NodeData, split: Split, preset: Preset) -> str:
    return (
        f"{data.name}: {data.num_nodes:,} nodes, {data.edge_index.shape[1]:,} directed edges, "
        f"{data.x.shape[1]:,} features, {data.num_classes} classes; {preset.split} split, "
        f"{split.train.numel()} / {split.val.numel()} / {split.test.numel()} nodes for "
        f"training / validation / test"
    )


def _describe_model(preset: Preset, parameters: int, device: torch.device) -> str:
    backend = os.environ.get("GRAND_FAST_BACKEND")
    chosen = f", GRAND_FAST_BACKEND={backend}" if backend else ""
    return (
        f"GRAND-{preset.variant}: {parameters:,} parameters, {preset.method} {_steps(preset)} "
        f"to T = {preset.T:g}; on {device}, "
        f"{torch.get_num_threads()} threads{chosen}"
    )


def _steps(preset: Preset) -> str:
    if preset.method not in ADAPTIVE:
        return f"with steps of {preset.step_size:g}"
    given = {"rtol": preset.rtol, "atol": preset.atol, "tol_scale": preset.tol_scale}
    named = [f"{name} = {value:g}" for name, value in given.items() if value is not None]
    return f"with {' and '.join(named) or 'default tolerances'}"


def _mean_std(values: list[float]) -> dict[str, Any]:
    """Mean and population standard deviation, as the paper's released code reports."""
    return {
        "test_accuracy": values,
        "mean": float(np.mean(values)),
        "std": float(np.std(values)),
    }
