"""One bar on a terminal, silent elsewhere."""

import sys

from tqdm import tqdm


class Progress:
    """Steps done, and what runs now."""

    def __init__(self, steps: int) -> None:
        self._bar = tqdm(
            total=steps,
            disable=not sys.stderr.isatty(),
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

    def close(self) -> None:
        """Clear the line for good."""
        self._bar.close()
