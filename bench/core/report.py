"""What a suite hands back: rows, figures, JSON; and how far it is."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.core.problem import OURS, RIVALS
from bench.core.tables import Row, print_table
from grand_fast.training.checkpoint import write_file


class Progress:
    """Steps done, and what runs now: a bar on a terminal; elsewhere, as in a log, a line each."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, steps: int) -> None:
        """Show progress, of so many steps from here on."""
        self._terminal = sys.stderr.isatty()
        self._steps, self._done, self._start = steps, 0, time.monotonic()
        self._bar = tqdm(
            total=steps,
            disable=not (steps and self._terminal),
            bar_format="{bar:20} {n_fmt}/{total_fmt} {elapsed} {desc}",
            leave=False,
        )

    def say(self, text: str) -> None:
        """Show what runs now."""
        self._bar.set_description_str(text.replace("|", ", "))

    def done(self) -> None:
        """One step further; the line is cleared, so that a table can be printed."""
        self._bar.update()
        self._bar.clear()
        self._done += 1
        if self._steps and not self._terminal:
            seconds = time.monotonic() - self._start
            print(f"{self._done}/{self._steps} steps, {seconds:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line for good."""
        self._bar.close()


@dataclass
class Report(Progress):
    """Everything that a suite measured, and how far it is.

    compared_with: whose results the competitors' must be.
    rows: one per competitor, shape and mode, or per size; they become JSON as they stand.
    figures: single named numbers, such as a speed-up or a share of the floor.
    skipped: what was not measured, and why; failed: what disagreed.
    saved: what an interrupt leaves on the disk, if nothing else is written.
    """

    suite: str
    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    figures: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    saved: str = "nothing"
    compared_with: str = "the reference"

    def __post_init__(self) -> None:
        super().__init__()

    def figure(self, name: str, value: float | None, unit: str) -> None:
        """Add one named number; not if it is None."""
        if value is not None:
            self.figures.append({"figure": name, "value": value, "unit": unit})

    def against_ours(self, rows: Sequence[Row], key: str, what: str, *, inverse: bool) -> None:
        """Each row's `key` over ours in its mode, or the inverse; of the rivals, as figures too."""
        ours = {row["mode"]: row[key] for row in rows if row["competitor"] == OURS}
        column = "ours_over_this" if inverse else "over_ours"
        for row in rows:
            name = row["competitor"]
            if row["mode"] not in ours or (inverse and name == OURS):
                continue
            ratio = row[key] / ours[row["mode"]]
            row[column] = 1 / ratio if inverse else ratio
            if name in RIVALS:
                rival = RIVALS[name]
                pair = f"ours over {rival}" if inverse else f"{rival} over ours"
                text = f"{row['op']} {row['shape']} {row['mode']}, {what}: {pair}"
                self.figure(text, row[column], "×")

    def print_notes(self) -> None:
        """Figures, then what is missing from the tables."""
        if self.figures:
            cells = [[f["figure"], f"{f['value']:.3g}", f["unit"]] for f in self.figures]
            print_table("figures", ["figure", "value", "unit"], cells)
        for text in self.skipped:
            print(f"Skipped: {text}")
        for text in self.failed:
            print(f"NOT TIMED, disagrees with {self.compared_with}: {text}")

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        keys = ("suite", "header", "rows", "figures", "skipped", "failed")
        values = {key: getattr(self, key) for key in keys}
        write_file(path, (json.dumps(values, indent=1) + "\n").encode())
