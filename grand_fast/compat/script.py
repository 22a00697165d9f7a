"""A program run in this process as Python would run it: its name, its path, its traceback."""

from __future__ import annotations

import os
import runpy
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grand_fast

INTERRUPTED = 130
_OURS = str(Path(grand_fast.__file__).parent) + os.sep
_RUNNERS = (_OURS, "<frozen runpy>", "<frozen importlib._bootstrap", runpy.__file__)


def run_script(path: str, arguments: Sequence[str]) -> int:
    """`python path arguments…`; the exit code."""
    with _as_program(path, arguments, os.path.dirname(os.path.realpath(path))):
        return _exit_code(lambda: runpy.run_path(path, run_name="__main__"))


def run_module(name: str, arguments: Sequence[str]) -> int:
    """`python -m name arguments…`; the exit code."""
    with _as_program(name, arguments, os.getcwd()):
        return _exit_code(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


@contextmanager
def _as_program(name: str, arguments: Sequence[str], folder: str) -> Iterator[None]:
    argv, path = sys.argv, list(sys.path)
    sys.argv = [name, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = folder
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _exit_code(run: Callable[[], object]) -> int:
    """What Python's would be; an exception is shown as Python shows it."""
    try:
        run()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        for each in _chain(error):
            each.__traceback__ = _of_the_program(each.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that it came from, each once."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            seen.append(one)
            waiting += [one.__cause__, one.__context__]
    yield from seen


def _of_the_program(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback without our frames, and those that started the program."""
    frames = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_RUNNERS):
            frames.append(trace)
        trace = trace.tb_next
    kept = None
    for one in reversed(frames):
        kept = types.TracebackType(kept, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return kept
