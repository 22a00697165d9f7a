"""One bar on a terminal; elsewhere, as in a log, a line for each step."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Steps done, and what runs now."""

    def __init__(self, steps: int) -> None:
        self._terminal = sys.stderr.isatty()
        self._steps, self._done, self._start = steps, 0, time.monotonic()
        self._bar = tqdm(
            total=steps,
            disable=not self._terminal,
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
        if not self._terminal:
            seconds = time.monotonic() - self._start
            print(f"{self._done}/{self._steps} steps, {seconds:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line for good."""
        self._bar.close()
