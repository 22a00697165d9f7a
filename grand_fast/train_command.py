"""`grand-fast train`: its arguments, one run, and what it tells."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grand_fast.console import FAILED, INTERRUPTED, fail, say
from grand_fast.data.datasets import DATASETS
from grand_fast.data.public_files import DataError
from grand_fast.ops.backends import BACKENDS, cannot_run
from grand_fast.training.checkpoint import CONFIG_FILE, WEIGHTS_FILE, WriteError
from grand_fast.training.configurations import read_config, usual_file
from grand_fast.training.folder import CURVES_FILE, NotWritableError, check_writable, usual_folder
from grand_fast.training.history import METRICS_FILE
from grand_fast.training.option_types import BAD_ARGUMENTS, BadOptionError, device, number, one_of
from grand_fast.training.options import EXAMPLES, add_preset_options, choose, flag_of, preset_table
from grand_fast.training.presets import OPTIONS

if TYPE_CHECKING:
    from grand_fast.training.experiment import Experiment, Results


def add_train(commands: Any) -> None:
    """Add the command to the subparsers of the program."""
    parser = commands.add_parser(
        "train",
        usage="grand-fast train [--dataset NAME | --data FILE] [--config FILE.toml] [options]",
        help="train GRAND on a data set",
        description="Train GRAND to classify the nodes of a graph; keep the weights that are\n"
        "best in validation, draw the training curves and report the test accuracy. A run that\n"
        "was stopped, even by a kill or a power failure, goes on where it was when the same\n"
        "command is given again, to the same result.",
        epilog=EXAMPLES + preset_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_train)

    def add(flag: str, kind: Callable[[str], Any], text: str, **more: Any) -> None:
        parser.add_argument(flag, type=kind, help=text, **more)

    def choose(flag: str, known: Sequence[str], text: str, **more: Any) -> None:
        add(flag, one_of(known), text, metavar="|".join(known), **more)

    choose("--dataset", DATASETS, "default: digits, which needs no files")
    add("--root", Path, "folder of the data sets (default: $GRAND_FAST_DATA, or data)",
        metavar="DIR")  # fmt: skip
    add("--data", Path, "your own graph instead: an npz file of edge_index [2, E], x [N, F], y [N] "
        "(integers or words) and perhaps edge_weight, and train, val and test (ids of nodes or "
        "masks, also called train_mask and so on); or a folder of such CSV files",
        metavar="FILE")  # fmt: skip
    add("--config", Path, "TOML file with any of the options of data, model, solver and training, "
        "and perhaps dataset; those on the command line win", metavar="FILE.toml")  # fmt: skip
    add("--seeds", number(int, low=1), "runs, with seeds 0 to N-1 (default: 1)", default=1,
        metavar="N")  # fmt: skip
    choose("--backend", BACKENDS, "of the operators (default: auto)", default="auto")
    add("--device", device, "cpu, cuda or cuda:N (default: cuda if there is one, else cpu)",
        metavar="DEVICE")  # fmt: skip
    add("--out", Path, "folder of the run: weights, curves, metrics and what it needs to go on "
        "(default: runs/DATASET-VARIANT, or that with a number where another run is)",
        metavar="DIR")  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="begin anew where --out holds a "
        "run, which is deleted")  # fmt: skip
    add("--json", Path, "write the summary to FILE; without FILE to standard output, and all "
        "else to standard error", metavar="FILE", nargs="?", const=Path("-"))  # fmt: skip
    add_preset_options(parser)


def _train(options: argparse.Namespace) -> int:
    # scikit-learn, PyG and matplotlib are imported further down, where they are used
    from grand_fast.training.experiment import summary, write_summary
    from grand_fast.training.run import run_seeds

    to_stdout = options.json == Path("-")

    def tell(line: str) -> None:
        say(line, sys.stderr if to_stdout else sys.stdout)

    try:
        experiment = _experiment(options)
        if reasons := _cannot_run(options.backend, experiment.device):
            return fail(reasons, FAILED)
        check_writable(experiment.out, "--out")
        if options.json is not None and not to_stdout:
            if options.json.is_dir():
                raise NotWritableError(f"--json must be a file, got the folder {options.json}.")
            if options.json.is_file() or not options.json.exists():  # else a device or a pipe
                check_writable(options.json.parent, "--json")
        results = run_seeds(experiment, tell)
        if results.runs:
            _report(tell, summary(experiment, results))
        _tell_files(tell, experiment, results)
        if results.stopped is not None:
            return _stopped(results, experiment)
        if to_stdout:
            say(json.dumps(summary(experiment, results), indent=2))
        elif options.json is not None:
            write_summary(options.json, summary(experiment, results))
            tell(f"summary: {options.json}")
    except BadOptionError as error:
        return fail(error.phrased(flag_of), BAD_ARGUMENTS)
    except BrokenPipeError:
        raise
    except (DataError, NotWritableError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return fail(_text(error, options.restart), FAILED)
    return 0


def _text(error: Exception, restart: bool) -> str:
    if isinstance(error, WriteError):
        same = f"the same command{' without --restart' * restart}"
        return f"{error} A run that was begun goes on when {same} is given again."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error) or type(error).__name__


def _tell_files(tell: Callable[[str], None], experiment: Experiment, results: Results) -> None:
    seed = results.saved_seed
    if seed is None:
        return
    of_seed = "" if experiment.seeds == 1 and seed == 0 else f", of seed {seed}"
    if seed >= experiment.seeds:
        of_seed += ", which an earlier command with more seeds trained: better in validation"
    tell(f"weights: {experiment.out / WEIGHTS_FILE} (with {CONFIG_FILE}{of_seed})")
    tell(f"curves:  {experiment.out / CURVES_FILE}")
    tell(f"metrics: {experiment.out / METRICS_FILE}")


def _stopped(results: Results, experiment: Experiment) -> int:
    interrupted = results.stopped == "interrupted"
    kept = "Nothing was saved"
    if results.saved_seed is not None:
        kept = f"The best weights so far are in {experiment.out}; load them with "
        kept += "grand_fast.checkpoint.load_checkpoint"
        if interrupted:
            without = " without --restart" * experiment.restart
            kept += f", or give the same command{without} to go on"
    return fail(f"{results.stopped}. {kept}.", INTERRUPTED if interrupted else FAILED)


def _experiment(options: argparse.Namespace) -> Experiment:
    """What the options ask for; raises BadOptionError, and DataError of the user's own graph."""
    from grand_fast.data.user_file import read_graph
    from grand_fast.training.experiment import Experiment

    config = {} if options.config is None else _config(options.config)
    given = {name: value for name, value in vars(options).items() if name in OPTIONS}
    own, sources = None, []
    if options.data is not None:
        if options.dataset is not None or options.root is not None:
            other = "--dataset" if options.dataset is not None else "--root"
            raise BadOptionError(f"{other} is not used with --data, which is a graph of your own.")
        own = read_graph(options.data)
        split = "random" if own.public_split is None else "public"
        chosen = choose(None, config, given, split=split)
    else:
        dataset = options.dataset or config.get("dataset", "digits")
        if options.root is not None and dataset == "digits":
            raise BadOptionError(
                "--root is not used by digits, which is built in. Did you forget --dataset?"
            )
        chosen = choose(dataset, config, given)
        sources.append(usual_file(dataset, chosen.variant))
    if options.config is not None:
        sources.append(options.config)
    name = dataset if own is None else own.name
    experiment = Experiment(
        name, chosen, options.seeds,
        options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        options.out or Path("runs"), options.root, own, options.backend, options.restart, sources,
    )  # fmt: skip
    if options.out is None:
        folder = usual_folder(f"{name}-{chosen.variant}", experiment.configuration)
        experiment = replace(experiment, out=folder)
    return experiment


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_config(path)
    except BadOptionError as error:
        raise BadOptionError(f"{{--config}}: {error}") from error


def _report(tell: Callable[[str], None], content: dict[str, Any]) -> None:
    runs = len(content["test_accuracy"])
    count = "1 seed" if runs == 1 else f"{runs} seeds"
    line = f"test accuracy {content['mean']:.4f} ± {content['std']:.4f} ({count})"
    if spread := content["label_spreading"]:
        line += (
            f"; label spreading on the same graph and labels: "
            f"{spread['mean']:.4f} ± {spread['std']:.4f}"
        )
    tell(line)


def _cannot_run(backend: str, device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"--device {device}: torch sees no GPU. Use --device cpu, or see grand-fast info."
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"--device {device}: torch sees {torch.cuda.device_count()} GPUs."
    source = "--backend"
    if backend == "auto" and (backend := os.environ.get("GRAND_FAST_BACKEND") or backend) != "auto":
        source = "GRAND_FAST_BACKEND"
    if backend not in BACKENDS:
        return f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}."
    problem = cannot_run(backend, device, torch.float32)
    return f"{source}: {problem}" if problem else None
