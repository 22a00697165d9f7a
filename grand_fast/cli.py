"""`grand-fast train | run | bench | info`.

Exit codes: 0 done, 1 failed, 2 bad arguments, 130 interrupted (Ctrl-C), 141 the
reader of the output has gone.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grand_fast as gf
from grand_fast.compat.command import main as run
from grand_fast.console import FAILED, INTERRUPTED, accept_every_character, fail, say, until_closed
from grand_fast.train_command import add_train
from grand_fast.training.checkpoint import WriteError
from grand_fast.training.option_types import BAD_ARGUMENTS, OneLineParser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; by default those of this process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:  # a program of the user's, which has the streams as they are
        return run(arguments[1:], until_exit=argv is None)
    accept_every_character()
    if arguments[:1] == ["bench"]:  # the suites read their own options
        return _bench(arguments[1:])
    try:
        return until_closed(lambda: _run(arguments))
    except WriteError as error:
        return fail(str(error), FAILED)


def _run(arguments: list[str]) -> int:
    try:
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else BAD_ARGUMENTS
    except KeyboardInterrupt:
        return fail("interrupted.", INTERRUPTED)
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
    add_train(commands)
    info = commands.add_parser(
        "info",
        help="machine, backends, versions, and what is missing",
        description="Print the machine, threads, memory, backends (and why one is unavailable), "
        "versions, and what is missing with the way to get it.",
        allow_abbrev=False,
    )
    info.set_defaults(run=_info)
    commands.add_parser("run", help="run other people's GRAND code on these kernels",
                        add_help=False)  # fmt: skip
    commands.add_parser("bench", help="run the benchmark suites of a checkout", add_help=False)
    return parser


def _info(options: argparse.Namespace) -> int:
    from grand_fast.info import describe_installation

    for line in describe_installation():
        say(line)
    return 0


def _bench(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        return fail(
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
