"""Lines for the user, whatever a stream's encoding and whoever reads its other end."""

import codecs
import contextlib
import os
import sys
from collections.abc import Callable
from typing import TextIO

from grand_fast.training.checkpoint import WriteError

# Exit codes
FAILED, INTERRUPTED = 1, 130
CLOSED_PIPE = 141  # as of a process that SIGPIPE ended
_HANDLER = "grand_fast_plain"
_IN_ASCII = {"±": "+-", "×": "x", "–": "-", "−": "-", "→": "->", "…": "..."}


def accept_every_character() -> None:
    """What the encoding of standard output or error lacks is written in ASCII, not refused."""
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def until_closed(run: Callable[[], int]) -> int:
    """The exit code of `run`; `CLOSED_PIPE`, and nothing said, if the reader of its lines goes."""
    try:
        code = run()
        say("", end="")  # flushes what was printed otherwise
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            try:
                say("", stream, end="")
            except BrokenPipeError:
                _discard(stream)
        return CLOSED_PIPE
    return code


def say(line: str, stream: TextIO | None = None, *, end: str = "\n") -> None:
    """Print a line at once.

    Raises:
        BrokenPipeError: its reader has gone. WriteError: there is no room.
    """
    stream = stream or sys.stdout
    try:
        print(line, file=stream, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(stream)
        raise WriteError(error.errno, error.strerror or str(error), "the output") from error


def _discard(stream: TextIO) -> None:
    """Let go of what is in the buffer, which would fail once more when Python ends."""
    # Where it is no file, or closed, or None, there is nothing to let go of
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = [_IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text]
    return "".join(plain), error.end


def fail(message: str, code: int) -> int:
    """Say in one line what went wrong; the exit code."""
    print(f"grand-fast: {message}", file=sys.stderr)
    return code
