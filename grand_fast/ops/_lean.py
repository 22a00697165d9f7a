"""Whether operators keep for backward what they can compute again."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_lean: ContextVar[bool] = ContextVar("grand_fast_lean", default=False)


@contextmanager
def lean() -> Iterator[None]:
    """A block in which they do not: for callers who save memory at the price of time anyway."""
    token = _lean.set(True)
    try:
        yield
    finally:
        _lean.reset(token)


def is_lean() -> bool:
    """Whether such a block is running."""
    return _lean.get()
