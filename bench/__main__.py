"""`python -m bench SUITE`: chooses a suite, prints its tables, writes JSON and plots.

Exit codes: 0 done, 1 a competitor disagrees with the reference, or the working tree with the base,
2 bad arguments, 130 interrupted, 141 the reader of the output has gone.
"""

import argparse
import logging
import sys
import warnings
from importlib import import_module

import torch

from bench.core import machine
from bench.core.options import SUITES, parser, shape_of
from bench.core.report import Report
from grand_fast.console import accept_every_character, until_closed
from grand_fast.training.option_types import BAD_ARGUMENTS

FAILED, INTERRUPTED = 1, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one suite; returns the exit code."""
    accept_every_character()
    return until_closed(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    reader = parser(arguments)
    options = reader.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
    logging.getLogger("torch").setLevel(logging.ERROR)
    report = None
    try:
        options.shape = shape_of(options)
        _writable(options)
        if options.threads:
            torch.set_num_threads(options.threads)
        # of this process alone: a caller's is the caller's
        keeps = options.allocator == "keep" and __name__ == "__main__" and machine.keep_memory()
        about = {"graph": options.graph, "allocator": "keep" if keeps else "system"}
        report = Report(options.suite, machine.header(arguments) | about)
        import_module(SUITES[options.suite][0]).run(options, report)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, machine.DoesNotFitError) as problem:
        reader.exit(BAD_ARGUMENTS, f"{reader.prog}: {problem}\n")
    except KeyboardInterrupt:
        written = "nothing" if report is None else report.saved
        if options.json and report is not None and report.rows:
            report.write(options.json)
            written = f"what was measured so far to {options.json}"
        print(f"{reader.prog}: interrupted; written: {written}.", file=sys.stderr)
        return INTERRUPTED
    report.print_notes()
    if options.json:
        report.write(options.json)
        print(f"\nWritten: {options.json}")
    if options.out:
        print(f"Plots: {options.out}")
    return FAILED if report.failed else 0


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
