"""`grand-fast train`: some seeds of one model on one data set."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grand_fast.arguments import BadOptionError
from grand_fast.checkpoint import save_checkpoint
from grand_fast.data import NodeData, Split, fingerprint, label_spreading_accuracy
from grand_fast.graph import Graph
from grand_fast.info import versions
from grand_fast.metrics import Epoch, Metrics
from grand_fast.nn import GRAND
from grand_fast.ops._dispatch import Backend, backend
from grand_fast.prepared_data import describe, prepared, splits_of
from grand_fast.presets import Preset
from grand_fast.run_folder import CURVES_FILE, RunFolder
from grand_fast.solvers import ADAPTIVE
from grand_fast.train import fit
from grand_fast.trainer import Fit, rank


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

    @property
    def configuration(self) -> dict[str, Any]:
        """What decides the results of a seed: two runs with equal ones are the same run."""
        found = versions()
        return {
            "dataset": self.dataset,
            "data": None if self.data is None else fingerprint(self.data),
            **asdict(self.preset),
            "device": self.device.type,
            "backend": self.backend if self.backend != "auto" else _default_backend() or "auto",
            "versions": {name: found[name] for name in ("grand_fast", "torch")},
        }


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

    Seeds that `out` says are finished are not trained again, and one that was stopped there, even
    by a kill, goes on to the same result.

    Args:
        experiment: what to train.
        say: takes lines for the user.

    Raises:
        BadOptionError: options that do not fit, or another run in `out`, or another process at
            work there. DataError: files missing or damaged.

    An interrupt or a failed solve ends the runs: `Results.stopped` tells.
    """
    preset = experiment.preset
    folder = RunFolder(experiment.out, experiment.configuration, restart=experiment.restart)
    data = prepared(experiment.dataset, preset, experiment.root, experiment.data)
    splits = splits_of(data, preset, experiment.seeds)
    config = model_config(data, preset)
    graph = Graph.from_edge_index(
        data.edge_index, data.num_nodes, data.edge_weight, self_loops=preset.self_loops
    )
    on_device = replace(data, x=data.x.to(experiment.device), y=data.y.to(experiment.device))
    graph = graph.to(experiment.device)

    is_digits = experiment.data is None and experiment.dataset == "digits"
    results = Results()
    done: list[tuple[int, list[Epoch]]] = []
    metrics = Metrics(experiment.out, done)

    def note(seed: int, index: int, epoch: Epoch) -> None:
        folder.begin()
        metrics.add(seed, index, epoch)

    try:
        folder.lock()
        say(describe(data, splits[0], preset))
        for seed, split in enumerate(splits):
            torch.manual_seed(seed)
            model = _model(config).to(experiment.device)
            if seed == 0:
                results.parameters = sum(p.numel() for p in model.parameters())
                say(_describe_model(preset, results.parameters, experiment.device))
            earlier = folder.finished(seed)
            if earlier is None:
                if folder.has_begun and folder.state(seed).exists():
                    say(f"seed {seed}: goes on from {folder.state(seed)}")
                note_seed = partial(note, seed)
                run = _fit(model, on_device, graph, split, seed, experiment, folder, note_seed)
                _keep_if_best(results, run, seed, config, experiment)
                if run.stopped is not None:
                    results.stopped = run.stopped
                    break
                spread = label_spreading_accuracy(data, split) if is_digits else None
                folder.finish(seed, run, spread)
            else:
                run, spread = earlier
                _keep_if_best(results, run, seed, config, experiment)
            done.append((seed, run.history))
            results.runs.append(run)
            if spread is not None:
                results.label_spreading.append(spread)
            say(
                f"seed {seed}: test accuracy {run.test_accuracy:.4f}, validation "
                f"{run.best.val_accuracy:.4f} at epoch {run.best_epoch}; "
                f"{run.seconds_per_epoch:.3f} s an epoch, {run.best.nfe} evaluations of f"
                + ("" if earlier is None else " (finished before)")
            )
    finally:
        metrics.close()
        folder.close()
    return results


def _fit(
    model: GRAND,
    data: NodeData,
    graph: Graph,
    split: Split,
    seed: int,
    experiment: Experiment,
    folder: RunFolder,
    note: Callable[[int, Epoch], None],
) -> Fit:
    preset = experiment.preset
    try:
        with backend(experiment.backend):
            return fit(
                model,
                data,
                graph,
                split,
                **training_config(preset),
                label=f"seed {seed}",
                state=folder.state(seed),
                resume=folder.has_begun,
                on_epoch=note,
            )
    except (TypeError, ValueError, NotImplementedError) as error:
        if str(error).startswith(("integrate: ", "fit: ")):  # all it was given are options
            raise BadOptionError(str(error)) from error
        raise


def model_config(data: NodeData, preset: Preset) -> dict[str, Any]:
    """The arguments of `GRAND`."""
    same = (
        "variant", "heads", "attention_channels", "score", "normalizer", "normalize", "reweight",
        "laplacian", "attention_threshold", "attention_quantile", "source", "augment", "batch_norm",
        "encoder_channels", "mlp", "fc_out", "degree_scaling", "decoder", "constant_init",
        "dropout", "input_dropout", "method", "T", "step_size", "rtol", "atol", "tol_scale",
        "adjoint", "tol_scale_adjoint", "memory_limit", "max_nfe",
    )  # fmt: skip
    return {
        "in_channels": data.x.shape[1],
        "hidden_channels": preset.hidden,
        "out_channels": data.num_classes,
        "label_channels": data.num_classes if preset.use_labels else 0,
        "regularizers": list(preset.penalties),
        **{name: getattr(preset, name) for name in same},
    }


def training_config(preset: Preset) -> dict[str, Any]:
    """The options of `fit`."""
    same = (
        "epochs", "lr", "weight_decay", "optimizer", "patience", "early_stop", "penalties",
        "entropy", "entropy_warmup", "use_labels", "select",
    )  # fmt: skip
    return {name: getattr(preset, name) for name in same}


def _model(config: dict[str, Any]) -> GRAND:
    try:
        return GRAND(**config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BadOptionError(str(error)) from error


def _keep_if_best(
    results: Results, run: Fit, seed: int, config: dict[str, Any], experiment: Experiment
) -> None:
    if run.best_epoch < 0:
        return
    select = experiment.preset.select
    if results.saved is not None and _rank(run, select) <= _rank(results.saved, select):
        return
    results.saved = run
    if not run.weights:  # finished before: its files are there
        return
    from grand_fast.plots import draw_training_curves

    about = {
        "model": config | {"T": run.best.time},
        "dataset": experiment.dataset,
        "options": asdict(experiment.preset),
        "seed": seed,
        "epoch": run.best_epoch,
        "val_accuracy": run.best.val_accuracy,
        "test_accuracy": run.test_accuracy,
        "versions": versions(),
    }
    save_checkpoint(experiment.out, run.weights, about)
    title = f"GRAND-{experiment.preset.variant} on {experiment.dataset}, seed {seed}"
    draw_training_curves(run, experiment.out / CURVES_FILE, title=title)


def _rank(run: Fit, select: str) -> tuple[float, float]:
    # By what chooses among the epochs of a seed. By another measure the weights that an interrupt
    # left in the folder could stay there, better than all that the resumed run ends with.
    return rank(select, run.best.val_accuracy, run.best.val_loss)


def _describe_model(preset: Preset, parameters: int, device: torch.device) -> str:
    name = _default_backend()
    chosen = f", GRAND_FAST_BACKEND={name}" if name else ""
    return (
        f"GRAND-{preset.variant}: {parameters:,} parameters, {preset.method} {_steps(preset)} "
        f"to T = {preset.T:g}; on {device}, "
        f"{torch.get_num_threads()} threads{chosen}"
    )


def _default_backend() -> str | None:
    return os.environ.get("GRAND_FAST_BACKEND")


def _steps(preset: Preset) -> str:
    if preset.method not in ADAPTIVE:
        return f"with steps of {preset.step_size:g}"
    given = {"rtol": preset.rtol, "atol": preset.atol, "tol_scale": preset.tol_scale}
    named = [f"{name} = {value:g}" for name, value in given.items() if value is not None]
    return f"with {' and '.join(named) or 'default tolerances'}"
