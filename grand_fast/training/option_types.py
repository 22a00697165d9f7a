"""Types of command-line arguments, and a parser whose errors are one line each."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

BAD_ARGUMENTS = 2  # exit code
NONE = "none"  # an option that is set to nothing


class BadOptionError(ValueError):
    """Options that do not fit each other or the data."""


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print what was wrong and exit."""
        self.exit(BAD_ARGUMENTS, f"{self.prog}: {message} (see {self.prog} --help)\n")


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """A name out of `known`, whatever its case; the parser lists them as `.names`."""

    def parse(text: str) -> str:
        for name in known:
            if text.lower() == name.lower():
                return name
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {text!r}")

    parse.names = tuple(known)  # type: ignore[attr-defined]
    return parse


def flag(text: str) -> bool:
    """`true` or `false`."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")


def optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """What `parse` reads, or the word none, which stays as it is."""

    def parse_or_none(text: str) -> Any:
        return NONE if text.lower() == NONE else parse(text)

    parse_or_none.names = getattr(parse, "names", ())  # type: ignore[attr-defined]
    return parse_or_none


def number(
    kind: type[int] | type[float],
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Callable[[str], float]:
    """A finite number within bounds."""
    bounds = [("at least", low), ("above", above), ("below", below)]
    limits = " and ".join(f"{word} {value:g}" for word, value in bounds if value is not None)
    expected = f"must be {'an integer' if kind is int else 'a number'} {limits}"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (
                math.isfinite(value)
                and (low is None or value >= low)
                and (above is None or value > above)
                and (below is None or value < below)
            ):
                return value
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")

    return parse


def device(text: str) -> torch.device:
    """A CPU or CUDA device, which need not exist."""
    with contextlib.suppress(RuntimeError):
        parsed = torch.device(text)
        if parsed.type in ("cpu", "cuda"):
            return parsed
    raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
