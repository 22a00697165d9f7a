"""The configurations of the package, one per data set and variant; in `released/` some with
the values that the paper's released code tuned, unchanged."""

from __future__ import annotations

from pathlib import Path

from grand_fast.training.options import choose, read_config
from grand_fast.training.presets import Preset

FOLDER = Path(__file__).parents[2] / "grand_fast" / "training" / "configurations"
RELEASED = FOLDER / "released"


def configurations(folder: Path = FOLDER) -> list[tuple[str, str]]:
    """Data set and variant of each file, in the order of the file names."""
    paths = sorted(folder.glob("*.toml"), key=lambda path: path.stem)
    found = [read_config(path) for path in paths]
    return [(config["dataset"], config["variant"]) for config in found]


def configuration(dataset: str, variant: str, folder: Path = FOLDER) -> Preset:
    """The options of one of them: what its file says, on the defaults of `Preset`.

    Raises:
        ValueError: there is none; or a field is not one of `Preset`.
    """
    path = folder / f"{dataset}-{variant}.toml"
    if not path.is_file():
        known = ", ".join(f"{d}-{v}" for d, v in configurations(folder))
        raise ValueError(f"configuration: must be one of {known}, got {dataset}-{variant}.")
    return choose(None, read_config(path), {})
