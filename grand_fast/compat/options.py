"""What a patch was asked for, checked, and the report of what it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

_INDENT = "  "


class Report:
    """Counts of one patch; `str(report)` is what `grand-fast run` prints.

    Attributes:
        used: how often each thing ran on our kernels, by its name.
        left: how often each thing ran as it was, by its name and the reason.
    """

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()

    def use(self, name: str) -> None:
        """Count one use."""
        self.used[name] += 1

    def leave(self, name: str, reason: str) -> None:
        """Count once that a thing ran as it was."""
        self.left[name, reason] += 1

    def __str__(self) -> str:
        width = max((len(name) for name in self.used), default=0)
        used = [f"{_INDENT}{name:<{width}}  {times(n)}" for name, n in self.used.items()]
        left = [
            f"{_INDENT}{name}: {reason} ({times(n)})" for (name, reason), n in self.left.items()
        ]
        lines = ["grand-fast: on its kernels ran"] + (used or [f"{_INDENT}nothing"])
        if left:
            lines += ["grand-fast: left as it was", *left]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Report: used {dict(self.used)}, left {dict(self.left)}>"


def times(n: int) -> str:
    """`once`, or how many times."""
    return "once" if n == 1 else f"{n:,} times"


@dataclass(eq=False)
class Options:
    """The arguments of `patch`.

    Attributes:
        target, spmm, attention, fields, solver, early_stop, verify: as given to `patch`.
        report: what was done so far.
    """

    target: nn.Module | None
    spmm: bool
    attention: bool
    fields: str | None
    solver: str | None
    early_stop: bool
    verify: bool
    report: Report = field(default_factory=Report, init=False)

    def __post_init__(self) -> None:
        if self.target is not None and not isinstance(self.target, nn.Module):
            got = type(self.target).__name__
            raise TypeError(f"patch: `target` must be a Module or None, got {got}.")
        for name in ("spmm", "attention", "early_stop", "verify"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"patch: `{name}` must be a bool, got {type(value).__name__}.")
        if self.fields not in ("known", None):
            raise ValueError(f"patch: `fields` must be 'known' or None, got {self.fields!r}.")
        if self.solver not in ("same", "exact", None):
            expected = "must be 'same', 'exact' or None"
            raise ValueError(f"patch: `solver` {expected}, got {self.solver!r}.")
