"""The configurations `configs/<dataset>-<variant>.toml`, as `grand-fast train --config` takes them."""

from __future__ import annotations

import tomllib
from pathlib import Path

from grand_fast.presets import Preset, preset

FOLDER = Path(__file__).parent / "configs"


def configurations() -> list[tuple[str, str]]:
    """Data set and variant of each file, in the order of the file names."""
    found = []
    for path in sorted(FOLDER.glob("*.toml")):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        found.append((values["dataset"], values["variant"]))
    return found


def configuration(dataset: str, variant: str) -> Preset:
    """The options of one of them.

    Raises:
        ValueError: there is none; or a field is not one of `Preset`.
    """
    path = FOLDER / f"{dataset}-{variant}.toml"
    if not path.is_file():
        known = ", ".join(f"{d}-{v}" for d, v in configurations())
        raise ValueError(f"configuration: must be one of {known}, got {dataset}-{variant}.")
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    return preset(values.pop("dataset"), **values)
