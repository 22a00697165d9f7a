"""`grand-fast train`: some seeds of one model on one data set."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from grand_fast.data.datasets import NodeData, Split, label_spreading_accuracy
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.ops.backends import backend
from grand_fast.solvers.checks import OptionError
from grand_fast.training.checkpoint import save_checkpoint
from grand_fast.training.environment import torch_memory_errors, versions
from grand_fast.training.experiment import Experiment, Results, describe_model, figures
from grand_fast.training.folder import CURVES_FILE, RunFolder, draw_training_curves
from grand_fast.training.history import METRICS_FILE, Epoch, Metrics
from grand_fast.training.loop import fit
from grand_fast.training.option_types import BadOptionError
from grand_fast.training.prepare import describe, prepared, remarks, splits_of
from grand_fast.training.presets import Preset, model_config, training_config
from grand_fast.training.trainer import Fit, rank


@torch_memory_errors()
def run_seeds(experiment: Experiment, say: Callable[[str], None]) -> Results:
    """Train every seed, saving the best weights and their curves after each.

    Seeds that `out` says are finished are not trained again, but for one whose weights should be
    there and are not; and one that was stopped there, even by a kill, goes on to the same result.

    Args:
        experiment: what to train.
        say: takes lines for the user.

    Raises:
        BadOptionError: options that do not fit, or another run in `out`, or another process at
            work there. DataError: files missing or damaged. WriteError: no room for the results.
        MemoryError: the CPU has not enough.

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
    results = Results(classes=data.class_names)
    with closing(folder):
        folder.lock()
        if experiment.sources:
            say(f"configuration: {', and over it '.join(map(str, experiment.sources))}")
        for line in (describe(data, splits[0], preset), *remarks(data, preset)):
            say(line)
        earlier, kept = folder.all_finished(), folder.seed_of_weights()
        if (lost := _lost(earlier, kept, experiment)) is not None:
            say(f"seed {lost}: its weights are gone from {experiment.out}; it is trained again")
            folder.forget(lost)
            del earlier[lost]
        # A run's weights take the place of those in the folder if they are better
        to_beat = _rank(earlier[kept][0], preset) if kept in earlier else None
        histories = [(seed, run.history) for seed, (run, _) in earlier.items()]
        with closing(Metrics(experiment.out, histories)) as metrics:

            def note(seed: int, index: int, epoch: Epoch) -> None:
                folder.begin()
                metrics.add(seed, index, epoch)

            for seed, split in enumerate(splits):
                torch.manual_seed(seed)
                model = _model(config).to(experiment.device)
                if seed == 0:
                    results.parameters = sum(p.numel() for p in model.parameters())
                    say(describe_model(preset, results.parameters, experiment.device))
                if seed in earlier:
                    run, spread = earlier[seed]
                else:
                    if folder.has_begun and folder.state(seed).exists():
                        say(f"seed {seed}: goes on from {folder.state(seed)}")
                    note_seed = partial(note, seed)
                    run = _fit(model, on_device, graph, split, seed, experiment, folder, note_seed)
                if run.best_epoch >= 0 and (to_beat is None or _rank(run, preset) > to_beat):
                    to_beat = _rank(run, preset)
                    if seed not in earlier:
                        _save(run, seed, config, data.class_names, experiment)
                if run.stopped is not None:
                    results.stopped = run.stopped
                    break
                if seed not in earlier:
                    spread = label_spreading_accuracy(data, split) if is_digits else None
                    folder.finish(seed, run, spread)
                results.runs.append(run)
                if spread is not None:
                    results.label_spreading.append(spread)
                say(figures(seed, run) + (" (finished before)" if seed in earlier else ""))
        results.saved_seed = folder.seed_of_weights()
        if results.stopped is None:
            _restore(earlier, results, lost is not None, experiment)
    return results


def _restore(
    earlier: Mapping[int, tuple[Fit, float | None]],
    results: Results,
    has_retrained: bool,
    experiment: Experiment,
) -> None:
    """Write the tables and pictures of finished seeds that are gone, or out of their order."""
    runs = {seed: run for seed, (run, _) in earlier.items()} | dict(enumerate(results.runs))
    if has_retrained or not (experiment.out / METRICS_FILE).exists():
        histories = [(seed, runs[seed].history) for seed in sorted(runs)]
        with closing(Metrics(experiment.out, histories)) as metrics:
            metrics.begin()
    kept = results.saved_seed
    if kept in runs and not (experiment.out / CURVES_FILE).exists():
        _draw(runs[kept], kept, experiment)


def _lost(
    earlier: Mapping[int, tuple[Fit, float | None]], kept: int | None, experiment: Experiment
) -> int | None:
    """The best of the finished seeds, if better weights than those that the folder keeps."""
    ours = [seed for seed in earlier if seed < experiment.seeds]
    if not ours:
        return None

    def rank_of(seed: int) -> tuple[float, float]:
        return _rank(earlier[seed][0], experiment.preset)

    best = max(ours, key=rank_of)
    if kept is None:
        return best
    # An unfinished seed's weights are there because they were better than those of the finished
    return best if kept in earlier and rank_of(best) > rank_of(kept) else None


def _fit(
    model: GRAND, data: NodeData, graph: Graph, split: Split, seed: int, experiment: Experiment,
    folder: RunFolder, note: Callable[[int, Epoch], None],
) -> Fit:  # fmt: skip
    preset = experiment.preset
    try:
        with backend(experiment.backend):
            return fit(
                model, data, graph, split, **training_config(preset), label=f"seed {seed}",
                state=folder.state(seed), resume=folder.has_begun, on_epoch=note,
            )  # fmt: skip
    except OptionError as error:
        raise BadOptionError(str(error)) from error


def _model(config: dict[str, Any]) -> GRAND:
    try:
        return GRAND(**config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BadOptionError(str(error)) from error


def _save(
    run: Fit,
    seed: int,
    config: dict[str, Any],
    classes: Sequence[str] | None,
    experiment: Experiment,
) -> None:
    """Weights, configuration and curves of the best run so far."""
    about = {
        "model": config | {"T": run.best.time},
        "dataset": experiment.dataset,
        "classes": classes,
        "options": experiment.preset.options(),
        "seed": seed,
        "epoch": run.best_epoch,
        "val_accuracy": run.best.val_accuracy,
        "test_accuracy": run.test_accuracy,
        "versions": versions(),
    }
    save_checkpoint(experiment.out, run.weights, about)
    _draw(run, seed, experiment)


def _draw(run: Fit, seed: int, experiment: Experiment) -> None:
    title = f"GRAND-{experiment.preset.variant} on {experiment.dataset}, seed {seed}"
    draw_training_curves(run, experiment.out / CURVES_FILE, title=title)


def _rank(run: Fit, preset: Preset) -> tuple[float, float]:
    # By what chooses among the epochs of a seed. By another measure the weights that an interrupt
    # left in the folder could stay there, better than all that the resumed run ends with.
    return rank(preset.select, run.best.val_accuracy, run.best.val_loss)
