"""Whether operators keep for backward what they can compute again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_share: ContextVar[float] = ContextVar("grand_fast_lean", default=math.inf)


@contextmanager
def lean(share: float = 0.0) -> Iterator[None]:
    """A block in which they do not: for callers who save memory at the price of time anyway.

    Args:
        share: of the bytes of the state; what takes no more is kept all the same.
    """
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def is_lean() -> bool:
    """Whether such a block is running."""
    return math.isfinite(_share.get())


def lean_share() -> float:
    """That of the block that is running."""
    return _share.get()
