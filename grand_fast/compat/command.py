"""`grand-fast run`: a script with our kernels underneath, and what they did."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from grand_fast.compat.patching import Patch, patch, remove_through
from grand_fast.compat.script import NotAProgramError, as_program, run_program
from grand_fast.compat.stand_ins import stand_ins
from grand_fast.training.option_types import BAD_ARGUMENTS, OneLineParser

FAILED = 1
DESCRIPTION = """\
Run a Python program of GRAND or of a descendant as `python SCRIPT …` does, without an edit, with
grand-fast underneath:

  torch_sparse.spmm            by one kernel, on a graph that is kept for the edge index;
  SpGraphTransAttentionLayer   its weights are not written out where they meet spmm with the state
                               they are of: one pass over the edges computes both;
  torchdiffeq.odeint(_adjoint) by our solvers, with the same steps and the same gradients.

A layer is replaced only after a copy of it with random weights agreed with its own code, values
and gradients. What does not agree, or is not known, runs as it was. At the end a report on
standard error says what was used how often, and what was left alone and why. The exit code is the
program's.

Where torch_sparse or torch_scatter cannot be imported, stand-ins have the parts such code uses.
"""
EXAMPLES = """\
examples:
  grand-fast run run_GNN.py --dataset Cora --block attention --function laplacian
  grand-fast run -m unittest discover -s test
  grand-fast run --no-solver run_GNN.py      # torchdiffeq's own solvers
  python -m grand_fast.compat run_GNN.py     # the same command

In code: with grand_fast.compat.patch() as p: …; print(p.report). See docs/compat.md.
"""


def describe(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is the name of a "
        "module, as for python -m")  # fmt: skip
    parser.add_argument("--no-spmm", action="store_true", help="leave torch_sparse.spmm as it is")
    parser.add_argument("--no-attention", action="store_true", help="leave attention layers")
    parser.add_argument("--no-fields", action="store_true", help="leave vector fields in parts")
    solver = parser.add_mutually_exclusive_group()
    solver.add_argument("--no-solver", action="store_true", help="leave torchdiffeq's solvers")
    solver.add_argument("--exact", action="store_true", help="exact gradients in place of those of "
        "odeint_adjoint: another training")  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="say nothing at the end")
    parser.add_argument("script", metavar="SCRIPT", help="the program")
    rest = parser.add_argument("arguments", metavar="…", nargs=argparse.REMAINDER,
                               help="its arguments")  # fmt: skip
    rest.required = False  # else a missing SCRIPT is one of two
    return parser


def main(argv: Sequence[str], *, prog: str = "grand-fast run", until_exit: bool = False) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name.
        prog: its name in messages.
        until_exit: this process ends with the program: what its threads and exit handlers do is
            part of it, and the report comes after them. Otherwise all is put back on return.

    Returns:
        The exit code: that of the script, or 2 if there is none.
    """
    parser = describe(
        OneLineParser(
            prog=prog,
            usage=f"{prog} [options] SCRIPT.py [its arguments]",
            description=DESCRIPTION,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_ARGUMENTS
    if not options.is_module and not Path(options.script).exists():
        print(f"{prog}: there is no file {options.script!r}.", file=sys.stderr)
        return BAD_ARGUMENTS
    ending = ExitStack()
    if until_exit:
        atexit.register(ending.close)  # Python first waits for threads, then asks handlers in turn
    with contextlib.nullcontext() if until_exit else ending:
        try:
            _prepare(options, ending)
            return run_program(options.script, is_module=options.is_module)
        except NotAProgramError as error:
            options.no_report = True
            print(f"{prog}: {error}.", file=sys.stderr)
            return FAILED


def _prepare(options: argparse.Namespace, ending: ExitStack) -> None:
    """What the program finds, and what is to be done at its end."""
    program = as_program(options.script, options.arguments, is_module=options.is_module)
    ending.enter_context(program)  # first, for a torch_sparse beside the program is not ours
    reasons = ending.enter_context(stand_ins())
    applied = patch(
        spmm=not options.no_spmm,
        attention=not options.no_attention,
        fields=None if options.no_fields else "known",
        solver=None if options.no_solver else "exact" if options.exact else "same",
        early_stop=not options.no_solver,
    )
    for name, reason in reasons.items():
        applied.report.leave(name, f"{reason}; a stand-in was there")
    ending.callback(_finish, applied, options)


def _finish(applied: Patch, options: argparse.Namespace) -> None:
    """Undo the patch, and those that the program has left, and report."""
    remove_through(applied)
    if options.no_report:
        return
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{applied.report}\n")):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, closed, or None
            stream.write(text)
            stream.flush()
