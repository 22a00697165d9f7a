"""The finished runs of a part, in a JSON file that is always whole."""

import json
import shutil
from pathlib import Path
from typing import Any

from bench.core.tables import Row
from grand_fast.training.checkpoint import write_whole
from grand_fast.training.presets import Preset

# What makes two runs the same run, beside the component of the graph; if other options differ, the
# older one is out of date.
IDENTITY = ("dataset", "model", "at", "seed")
_DEFAULTS = Preset().options()


class Store:
    """Runs by identity and options.

    Args:
        path: of the JSON, which need not exist.
        header: of the machine and the command, written beside the runs.
        resume: keep what `path` holds; else start again, and overwrite it with the first run.

    `states` is the folder for what runs that were interrupted need to go on.

    Raises:
        ValueError: `path` is not what a store wrote; how to go on.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool) -> None:
        self.path, self.header = path, header
        self.states = path.with_suffix(".state")
        self._keeps = resume  # what the file holds
        self.runs = self._read() if resume else []
        if not resume:
            shutil.rmtree(self.states, ignore_errors=True)

    def find(self, wanted: Row) -> Row | None:
        """The finished run with the identity and the options of `wanted`."""
        wanted = _plain(wanted)
        # An option that is younger than a run had its default
        found = (run for run in self.runs if _same(run, wanted)
                 and _DEFAULTS | run["options"] == wanted["options"])  # fmt: skip
        return next(found, None)

    def add(self, run: Row) -> None:
        """Keep `run` in place of any with its identity, and write the file.

        What another process has added to it meanwhile stays.
        """
        run = _plain(run | {"commit": self.header["commit"]})
        before = self._read() if self._keeps else []
        self.runs, self._keeps = [old for old in before if not _same(old, run)] + [run], True
        write_json(self.path, {"header": self.header, "runs": self.runs})

    def _read(self) -> list[Row]:
        if not self.path.is_file():
            return []
        try:
            runs: list[Row] = json.loads(self.path.read_text(encoding="utf-8"))["runs"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"paper: {self.path} must hold the runs of an earlier call, and does not "
                f"({error!r}). Move it away, or start again with --no-resume."
            ) from error
        return runs


def write_json(path: Path, content: Row) -> None:
    """Write so that `path` never holds a part of it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def _same(run: Row, other: Row) -> bool:
    one, two = (
        [r[key] for key in IDENTITY] + [r["options"].get("component")] for r in (run, other)
    )
    return one == two


def _plain(run: Row) -> Row:
    """As it comes back from JSON, so that tuples and the like compare equal."""
    plain: Row = json.loads(json.dumps(run))
    return plain
