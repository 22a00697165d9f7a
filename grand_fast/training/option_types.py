"""Types of command-line arguments, and a parser whose errors are one line each.

On argparse: jsonargparse reads nested dataclasses too, but names flags after the nesting
(`--solve.step_size`) and tells an error in many lines.
"""

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import torch

BAD_ARGUMENTS = 2  # exit code
NONE = "none"  # an option that is set to nothing


class BadOptionError(ValueError):
    """Options that do not fit each other or the data.

    `{--split}` in the message stands for that option: to the caller of a function its name.
    """

    def __str__(self) -> str:
        return self.phrased(lambda name: f"`{name}`")

    def phrased(self, name_of: Callable[[str], str]) -> str:
        """The message with `name_of` the name of each option in it, such as its flag."""
        return re.sub(r"\{--(\w+)\}", lambda found: name_of(found[1]), str(self.args[0]))


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
    """A bool, from `true` or `false` in any case."""
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


def parser_of(hint: Any, about: Mapping[str, Any]) -> Callable[[str], Any]:
    """What reads the text of an option.

    Args:
        hint: its type; a `Literal` within lists the names that may be given.
        about: `choices` and `bounds`, as `grand_fast.solvers.options.option` keeps them.
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    literals = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    parse: Callable[[str], Any]
    if names := about["choices"] or literals:
        parse = one_of(tuple(names))
    elif bool in kinds:
        parse = flag
    else:
        parse = number(int if int in kinds else float, **about["bounds"])
    return optional(parse) if NoneType in kinds else parse


def device(text: str) -> torch.device:
    """A CPU or CUDA device, which need not exist."""
    with contextlib.suppress(RuntimeError):
        parsed = torch.device(text)
        if parsed.type in ("cpu", "cuda"):
            return parsed
    raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
