"""`python -m bench SUITE`: chooses a suite, prints its tables, writes JSON and plots.

Exit codes: 0 done, 1 a competitor disagrees with the reference, or the working tree with the base,
2 bad arguments, 130 interrupted, 141 the reader of the output has gone.
"""

import argparse
import logging
import sys
import warnings
from importlib import import_module
from pathlib import Path

import torch

from bench.core import graphs, machine
from bench.core.configurations import BY_DATASET
from bench.core.problem import PAPER_SHAPES, Shape
from bench.core.report import Report
from bench.models import options as models_options
from bench.paper import options as paper_options
from grand_fast.console import accept_every_character, until_closed
from grand_fast.training.option_types import BAD_ARGUMENTS, OneLineParser, number, one_of

SUITES = {
    "ops": ("bench.ops.suite", "time of every operator against its peers and memory's floor"),
    "memory": ("bench.ops.memory", "peak memory of attention_diffusion against its peers"),
    "scaling": ("bench.ops.scaling", "time per edge against the size of the graph"),
    "overhead": ("bench.ops.overhead", "Python around the kernels: of an evaluation, of a call"),
    "tuned": ("bench.tuned.suite", "seven tuned configurations of the paper on their graphs"),
    "solvers": (
        "bench.solvers.suite",
        "error, time and memory of the solvers against torchdiffeq",
    ),
    "models": ("bench.models.suite", "an epoch of tuned models against the released code's"),
    "paper": ("bench.paper.suite", "the experiments of the paper, beside its numbers"),
    "gpu": (
        "bench.gpu.suite",
        "GPU kernels on a GPU: right, how fast, how lean",
    ),
    "gpu-report": ("bench.gpu_report.suite", "machine code of the GPU kernels, without a GPU"),
}
SOLVER_PARTS = ["step", "solve", "kept", "precision"]
FAILED, INTERRUPTED = 1, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one suite; returns the exit code."""
    accept_every_character()
    return until_closed(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
    logging.getLogger("torch").setLevel(logging.ERROR)
    report = None
    try:
        options.shape = _shape(options)
        _writable(options)
        if options.threads:
            torch.set_num_threads(options.threads)
        report = Report(options.suite, machine.header(arguments) | {"graph": options.graph})
        import_module(SUITES[options.suite][0]).run(options, report)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, machine.DoesNotFitError) as problem:
        parser.exit(BAD_ARGUMENTS, f"{parser.prog}: {problem}\n")
    except KeyboardInterrupt:
        written = "nothing" if report is None else report.saved
        if options.json and report is not None and report.rows:
            report.write(options.json)
            written = f"what was measured so far to {options.json}"
        print(f"{parser.prog}: interrupted; written: {written}.", file=sys.stderr)
        return INTERRUPTED
    report.print_notes()
    if options.json:
        report.write(options.json)
        print(f"\nWritten: {options.json}")
    if options.out:
        print(f"Plots: {options.out}")
    return FAILED if report.failed else 0


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m bench",
        description="Benchmarks of grand-fast against the ways to do the same without it.",
        epilog="`python -m bench SUITE --help` explains a suite. Try: python -m bench ops "
        "--graph random --quick",
    )
    suites = parser.add_subparsers(dest="suite", title="suites", metavar="SUITE", required=True)
    for name, (path, summary) in SUITES.items():
        added = suites.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            # its own text only when asked for: importing a suite imports its peers, which is slow
            epilog=import_module(path).EPILOG if name in arguments else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_options(added)
        if name == "paper":
            paper_options.add_options(added)
            continue
        _add_rounds(added)
        if name == "models":
            models_options.add_options(added)
        elif name == "tuned":
            added.add_argument(
                "--dataset",
                type=one_of(list(BY_DATASET)),
                metavar="|".join(BY_DATASET),
                help="one of them (default: all)",
            )
            added.set_defaults(graph="tuned")
        else:
            _add_problem_options(added)
        if name == "ops":
            text = "then the suites memory and scaling too, into the same files"
            added.add_argument("--all", action="store_true", help=text)
            text = "time the working tree against this commit, and nothing else"
            added.add_argument("--base", metavar="COMMIT", help=text)
        if name == "solvers":
            added.add_argument(
                "--part",
                type=one_of(SOLVER_PARTS),
                metavar="|".join(SOLVER_PARTS),
                help="one of the four (default: all)",
            )
        if name == "gpu":
            added.add_argument(
                "--minutes", type=number(float, low=0), default=8.0, metavar="M",
                help="time that it may take (default 8)",
            )  # fmt: skip
        if name == "gpu-report":
            text = "write golden.json anew, from the kernels as they are, and stop"
            added.add_argument("--update-golden", action="store_true", help=text)
    return parser


def _add_problem_options(parser: argparse.ArgumentParser) -> None:
    """Graph and shape, of the suites that let them be chosen."""
    count = number(int, low=1)
    main_shape = PAPER_SHAPES[0]
    parser.add_argument(
        "--graph",
        type=one_of(list(graphs.GRAPHS)),
        default="random",
        metavar="|".join(graphs.GRAPHS),
        help=f"arxiv: the real ogbn-arxiv graph from ${graphs.DATA_VARIABLE}; random: its size "
        "and degrees, generated (default); local: numbered by community; grid",
    )
    parser.add_argument("--nodes", type=count, metavar="N", help="size of a generated graph")
    for flag, default, text in (
        ("--channels", main_shape.channels, "channels of the state, d"),
        ("--heads", main_shape.heads, "attention heads, H"),
        ("--attention-channels", main_shape.attention_channels, "d_att, of all heads together"),
    ):
        parser.add_argument(
            flag, type=count, metavar="N", help=f"{text}; measures one shape (else {default})"
        )


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Of every suite."""
    count = number(int, low=1)
    parser.add_argument("--threads", type=count, metavar="N", help="default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw plots (PNG) into this folder")


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    """Of the suites that take times."""
    count = number(int, low=1)
    parser.add_argument("--rounds", type=count, metavar="N", help="interleaved rounds (default 9)")
    parser.add_argument("--quick", action="store_true", help="few rounds, and less of it")


def _shape(options: argparse.Namespace) -> Shape | None:
    """The shape asked for; None, meaning the suite's own, if no part of one is given."""
    names = ("channels", "heads", "attention_channels")
    given = tuple(getattr(options, name, None) for name in names)
    if given == (None, None, None):
        return None
    main_shape = PAPER_SHAPES[0]
    defaults = (main_shape.channels, main_shape.heads, main_shape.attention_channels)
    return Shape(*(value or default for value, default in zip(given, defaults, strict=True)))


def _writable(options: argparse.Namespace) -> None:
    """Fail before the work, not after it."""
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a"):
            pass


if __name__ == "__main__":
    sys.exit(main())
