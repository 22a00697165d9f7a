"""A program run in this process as Python would run it: its name, its path, its traceback."""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import os
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from pathlib import Path

import grand_fast

INTERRUPTED = 130
_OURS = str(Path(grand_fast.__file__).parent) + os.sep
_RUNNERS = (_OURS, "<frozen runpy>", "<frozen importlib.", importlib.util.__file__)
_Program = tuple[types.ModuleType, types.CodeType]


class NotAProgramError(Exception):
    """There is no such program; the message is what Python would say."""


@contextmanager
def as_program(name: str, arguments: Sequence[str], *, is_module: bool) -> Iterator[None]:
    """The arguments and the path of `python name arguments…`, or of `python -m`.

    They, and what `__main__` is, are put back at the end.
    """
    argv, path, main = sys.argv, list(sys.path), sys.modules["__main__"]
    sys.argv = [name, *arguments]
    if not is_module and _has_files(name):
        sys.path[: not sys.flags.safe_path] = [os.path.abspath(name)]
    elif not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(name))
    try:
        yield
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = argv, path, main


def run_program(name: str, *, is_module: bool) -> int:
    """Run it, inside `as_program`; it stays `__main__`.

    Returns:
        The exit code.

    Raises:
        NotAProgramError: there is none.
    """

    def run() -> None:
        main, code = _module(name) if is_module else _script(name)
        sys.modules["__main__"] = main
        exec(code, vars(main))

    return _exit_code(run)


def _has_files(name: str) -> bool:
    """Whether it is a folder or an archive, whose `__main__` is the program."""
    return pkgutil.get_importer(name) is not None


def _script(name: str) -> _Program:
    path = os.path.abspath(name)
    if _has_files(name):
        spec = PathFinder.find_spec("__main__", [path])
        if spec is None:
            raise NotAProgramError(f"can't find '__main__' module in {name!r}")
        return _loaded(spec)
    code: types.CodeType | None
    loader: SourceFileLoader | SourcelessFileLoader
    try:
        if path.endswith(".pyc"):
            loader = SourcelessFileLoader("__main__", path)
            code = loader.get_code("__main__")
        else:
            loader = SourceFileLoader("__main__", path)
            code = loader.source_to_code(loader.get_data(path), path)
    except OSError as error:
        raise NotAProgramError(f"can't open file {path!r}: {error.strerror}") from None
    assert code is not None
    return _main(path, loader, package=None, cached=None, spec=None), code


def _module(name: str) -> _Program:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                why = f"{name!r} is a package and cannot be directly executed"
                raise NotAProgramError(f"No module named {name}.__main__; {why}")
    except (ImportError, ValueError) as error:
        missing = getattr(error, "name", None)
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise  # one that the program's own package has not found
        spec = None
    if spec is None:
        raise NotAProgramError(f"No module named {name}")
    sys.argv[0] = spec.origin or sys.argv[0]
    return _loaded(spec)


def _loaded(spec: ModuleSpec) -> _Program:
    get_code = getattr(spec.loader, "get_code", None)
    code = None if get_code is None else get_code(spec.name)
    if code is None:
        raise NotAProgramError(f"No code object available for {spec.name}")
    path = spec.origin if spec.has_location else None
    return _main(path, spec.loader, package=spec.parent, cached=spec.cached, spec=spec), code


def _main(
    path: str | None,
    loader: object,
    *,
    package: str | None,
    cached: str | None,
    spec: ModuleSpec | None,
) -> types.ModuleType:
    """A module as the one that Python makes for its program."""
    main = types.ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __annotations__={}, __file__=path, __cached__=cached,
                      __loader__=loader, __package__=package, __spec__=spec)  # fmt: skip
    return main


def _exit_code(run: Callable[[], object]) -> int:
    """What Python's would be; an exception is shown as Python shows it."""
    try:
        run()
    except NotAProgramError:
        raise
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or None
            sys.stderr.write(f"{stop.code}\n")
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
