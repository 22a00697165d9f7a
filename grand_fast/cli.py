"""`grand-fast train | bench | info`.

Exit codes: 0 done, 1 failed, 2 bad arguments, 130 interrupted (Ctrl-C).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

import grand_fast as gf
from grand_fast.arguments import BAD_ARGUMENTS, OneLineParser, device, number, one_of
from grand_fast.data import DATASETS, SPLITS
from grand_fast.nn.grand import VARIANTS
from grand_fast.ops._dispatch import BACKENDS, cannot_run
from grand_fast.presets import PRESETS, Preset, preset
from grand_fast.raw_files import DataError
from grand_fast.solvers import ADAPTIVE, METHODS, Adjoint
from grand_fast.train import OPTIMIZERS

FAILED, INTERRUPTED = 1, 130

_TRAIN_EPILOG = """\
examples:
  grand-fast train
      handwritten digits, built in: half a minute on two cores, no download
  grand-fast train --dataset Cora --root ~/data --variant l --split planetoid --seeds 3 --json
      Cora as PyG's loaders keep it, ~/data/planetoid/Cora/raw or ~/data/Cora/raw

Options that are not given come from the data set's preset:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; by default those of this process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # the suites read their own options
        return _bench(arguments[1:])
    try:
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else BAD_ARGUMENTS
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="grand-fast",
        description="Graph neural diffusion (GRAND) on fused kernels.",
        epilog="`grand-fast COMMAND --help` explains a command. Try: grand-fast train",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"grand-fast {gf.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    info = commands.add_parser(
        "info",
        help="machine, backends, versions, and what is missing",
        description="Print the machine, threads, memory, backends (and why one is unavailable), "
        "versions, and what is missing with the way to get it.",
        allow_abbrev=False,
    )
    info.set_defaults(run=_info)
    commands.add_parser("bench", help="run the benchmark suites of a checkout", add_help=False)
    return parser


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train GRAND on a data set",
        description="Train GRAND to classify the nodes of a graph; keep the weights of the best\n"
        "validation accuracy, draw the training curves and report the test accuracy.",
        epilog=_TRAIN_EPILOG + _preset_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_train)

    def add(flag: str, kind: Callable[[str], Any], text: str, **more: Any) -> None:
        parser.add_argument(flag, type=kind, help=text, **({"metavar": "X"} | more))

    def choose(flag: str, known: Sequence[str], text: str, **more: Any) -> None:
        names = "|".join(known)
        add(flag, one_of(known), text, metavar=names, **more)

    count, positive = number(int, low=1), number(float, above=0)
    share = number(float, low=0, below=1)
    choose("--dataset", DATASETS, "default: digits, which needs no files", default="digits")
    add("--root", Path, "folder of the data sets (default: $GRAND_FAST_DATA, or data)",
        metavar="DIR")  # fmt: skip
    choose("--split", SPLITS, "published split, or one drawn by seed")
    add("--labels-per-class", count, "training nodes of each class in a random split")
    add("--neighbours", count, "of each image in the graph of digits")
    choose("--variant", VARIANTS, "attention from x(0), from each x(t), or none (default: nl)")
    add("--hidden", count, "channels of the state")
    add("--heads", count, "attention heads")
    add("--attention-channels", count, "of all heads together")
    choose("--method", tuple(METHODS), "solver (default: rk4)")
    add("--T", number(float, low=0), "diffusion time")
    add("--step-size", positive, "of methods with fixed steps")
    add("--rtol", positive, "relative tolerance of methods that choose their steps")
    add("--atol", positive, "absolute tolerance of these")
    add("--tol-scale", positive, "instead of both: atol = 1e-7 X, rtol = 1e-9 X")
    choose("--adjoint", get_args(Adjoint), "gradient of the solve (default: checkpoint)")
    add("--tol-scale-adjoint", positive, "tolerance scale of --adjoint continuous")
    add("--memory-limit", count, "bytes that --adjoint checkpoint may keep", metavar="BYTES")
    add("--dropout", share, "before the decoder")
    add("--input-dropout", share, "before the encoder")
    add("--seeds", count, "runs, with seeds 0 to N-1 (default: 1)", default=1, metavar="N")
    add("--epochs", count, "training steps", metavar="N")
    add("--lr", positive, "learning rate")
    add("--weight-decay", number(float, low=0), "weight decay")
    choose("--optimizer", tuple(OPTIMIZERS), "of the weights")
    choose("--backend", BACKENDS, "of the operators (default: auto)", default="auto")
    add("--device", device, "cpu, cuda or cuda:N (default: cuda if there is one, else cpu)",
        metavar="DEVICE")  # fmt: skip
    add("--out", Path, "folder for weights and curves (default: runs/DATASET-VARIANT)",
        metavar="DIR")  # fmt: skip
    add("--json", Path, "write the summary to FILE; without FILE to standard output, and all "
        "else to standard error", metavar="FILE", nargs="?", const=Path("-"))  # fmt: skip


def _train(options: argparse.Namespace) -> int:
    # scikit-learn, PyG and matplotlib are imported further down, where they are used
    from grand_fast.experiment import (
        BadOptionError,
        Experiment,
        NotWritableError,
        check_writable,
        run_seeds,
        summary,
        write_summary,
    )

    chosen = preset(
        options.dataset,
        split=options.split,
        labels_per_class=options.labels_per_class,
        neighbours=options.neighbours,
        variant=options.variant,
        method=options.method,
        hidden=options.hidden,
        heads=options.heads,
        attention_channels=options.attention_channels,
        T=options.T,
        step_size=options.step_size,
        rtol=options.rtol,
        atol=options.atol,
        tol_scale=options.tol_scale,
        adjoint=options.adjoint,
        tol_scale_adjoint=options.tol_scale_adjoint,
        memory_limit=options.memory_limit,
        dropout=options.dropout,
        input_dropout=options.input_dropout,
        epochs=options.epochs,
        lr=options.lr,
        weight_decay=options.weight_decay,
        optimizer=options.optimizer,
    )
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or Path("runs") / f"{options.dataset}-{chosen.variant}"
    experiment = Experiment(options.dataset, chosen, options.seeds, device, out, options.root)
    to_stdout = options.json == Path("-")

    def say(line: str) -> None:
        print(line, file=sys.stderr if to_stdout else sys.stdout, flush=True)

    if unused := _unused_option(options, chosen):
        return _fail(unused, BAD_ARGUMENTS)
    if reasons := _cannot_run(options.backend, device):
        return _fail(reasons, FAILED)
    try:
        check_writable(out, "--out")
        if options.json is not None and not to_stdout:
            check_writable(options.json.parent, "--json")
            if options.json.is_dir():
                raise NotWritableError(f"--json must be a file, got the folder {options.json}.")
        with gf.backend(options.backend):
            results = run_seeds(experiment, say)
    except BadOptionError as error:
        return _fail(str(error), BAD_ARGUMENTS)
    except (DataError, NotWritableError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        return _fail(str(error) or type(error).__name__, FAILED)
    if results.runs:
        _report(say, summary(experiment, results))
    if results.saved is not None:
        say(f"weights: {out / 'model.safetensors'} (with config.json)")
        say(f"curves:  {out / 'curves.png'}")
    if results.stopped is not None:
        interrupted = results.stopped == "interrupted"
        kept = "Nothing was saved"
        if results.saved is not None:
            load = "load them with grand_fast.train.load_checkpoint"
            kept = f"The best weights so far are in {out}; {load}"
        return _fail(f"{results.stopped}. {kept}.", INTERRUPTED if interrupted else FAILED)
    if to_stdout:
        print(json.dumps(summary(experiment, results), indent=2))
    elif options.json is not None:
        try:
            write_summary(options.json, summary(experiment, results))
        except OSError as error:
            return _fail(f"--json: {options.json}: {error.strerror}.", FAILED)
        say(f"summary: {options.json}")
    return 0


def _report(say: Callable[[str], None], content: dict[str, Any]) -> None:
    runs = len(content["test_accuracy"])
    count = "1 seed" if runs == 1 else f"{runs} seeds"
    line = f"test accuracy {content['mean']:.4f} ± {content['std']:.4f} ({count})"
    if spread := content["label_spreading"]:
        line += (
            f"; label spreading on the same graph and labels: "
            f"{spread['mean']:.4f} ± {spread['std']:.4f}"
        )
    say(line)


def _unused_option(options: argparse.Namespace, chosen: Preset) -> str | None:
    """An option that would be silently ignored."""
    if options.neighbours is not None and options.dataset != "digits":
        return f"--neighbours builds the graph of digits; {options.dataset} has a graph of its own."
    if options.labels_per_class is not None and chosen.split == "planetoid":
        return "--labels-per-class needs --split random, got --split planetoid."
    if options.root is not None and options.dataset == "digits":
        return "--root is not used by digits, which is built in. Did you forget --dataset?"
    return _unused_solver_option(options, chosen)


def _unused_solver_option(options: argparse.Namespace, chosen: Preset) -> str | None:
    adaptive = chosen.method in ADAPTIVE
    if options.step_size is not None and adaptive:
        return f"--step-size is not used by {chosen.method}, which chooses its steps. Use --rtol."
    if not adaptive and chosen.method != "implicit_adams":
        for name in ("rtol", "atol", "tol_scale"):
            if getattr(options, name) is not None:
                flag = "--" + name.replace("_", "-")
                return f"{flag} is not used by {chosen.method}, whose steps are --step-size."
    if options.tol_scale is not None and (options.rtol or options.atol):
        return "--tol-scale stands for --rtol and --atol: give it alone."
    if options.tol_scale_adjoint is not None and chosen.adjoint != "continuous":
        return "--tol-scale-adjoint needs --adjoint continuous."
    if options.memory_limit is not None and chosen.adjoint != "checkpoint":
        return f"--memory-limit needs --adjoint checkpoint, got --adjoint {chosen.adjoint}."
    return None


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


def _info(options: argparse.Namespace) -> int:
    from grand_fast.info import describe_installation

    for line in describe_installation():
        print(line)
    return 0


def _bench(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        return _fail(
            "bench: the suites are not installed with the package. Clone the repository and run "
            "`make bench`, or `python -m bench` in it.",
            FAILED,
        )
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "bench", *arguments]
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.run(command, env=environment).returncode
    return INTERRUPTED


def _fail(message: str, code: int) -> int:
    print(f"grand-fast: {message}", file=sys.stderr)
    return code


def _preset_table() -> str:
    columns = ("split", "variant", "hidden", "heads", "attention_channels", "T", "step_size",
               "dropout", "input_dropout", "epochs", "lr", "weight_decay")  # fmt: skip
    short = ("split", "variant", "hidden", "heads", "att.ch.", "T", "step", "dropout", "input",
             "epochs", "lr", "decay")  # fmt: skip
    rows = [["", *short]]
    for name, values in PRESETS.items():
        cells = [getattr(values, column) for column in columns]
        rows.append([name, *(f"{c:g}" if not isinstance(c, str) else c for c in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
