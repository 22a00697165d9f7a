"""The configurations of the data sets, one TOML file for each and a variant; they are read here.

Those of digits were searched by validation accuracy. Those of the other data sets were searched by
hand, with validation and test accuracy in view; from them come the tables of `bench/results/paper`.
`released/` holds what the paper's released code tuned for some of them, unchanged.
"""

import argparse
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grand_fast.data.datasets import DATASETS
from grand_fast.training.option_types import BadOptionError, one_of
from grand_fast.training.presets import OPTIONS, PARSERS, Preset, preset

FOLDER = Path(__file__).parent
RELEASED = FOLDER / "released"
USUAL_VARIANT = "nl"  # whose file serves the variants without one
# Of one call, not of what it trains
_COMMAND_LINE = ("seeds", "root", "data", "config", "backend", "device", "out", "restart", "json")
# Options that stand for each other: one that is given takes the place of the others given before
_ALTERNATIVES = (
    ({"rtol", "atol"}, {"tol_scale"}),
    ({"attention_threshold"}, {"attention_quantile"}),
    ({"rewiring_top_k"}, {"rewiring_threshold"}),
)


def read_config(path: Path) -> dict[str, Any]:
    """The options, and perhaps `dataset`, that a TOML file gives.

    Raises:
        BadOptionError: names the file, the key, what was expected and what came.
    """
    try:
        # With a byte-order mark, as some editors write, or without
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadOptionError(f"{path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadOptionError(f"{path} is not TOML: {error}.") from error
    return {name: _read_value(path, name, value) for name, value in content.items()}


def _read_value(path: Path, name: str, value: Any) -> Any:
    if name == "dataset":
        parse = one_of(DATASETS)
    elif name in OPTIONS:
        parse = PARSERS[name]
    elif name in _COMMAND_LINE:
        raise BadOptionError(f"{path}: {name} is given on the command line alone, by --{name}.")
    else:
        near = difflib.get_close_matches(name, ["dataset", *OPTIONS], n=1)
        meant = f" Did you mean {near[0]}?" if near else " See grand-fast train --help."
        raise BadOptionError(f"{path}: unknown key {name!r}.{meant}")
    try:
        if not isinstance(value, bool | int | float | str):
            raise argparse.ArgumentTypeError(f"must be one value, got {type(value).__name__}")
        return parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise BadOptionError(f"{path}: {name} {error}.") from error


def layered(*layers: Mapping[str, Any]) -> Preset:
    """The defaults, and over them the options of one layer after the other."""
    found: dict[str, Any] = {}
    for layer in layers:
        for pair in _ALTERNATIVES:
            for ours, theirs in (pair, pair[::-1]):
                if ours & layer.keys() and not theirs & layer.keys():
                    found = {name: value for name, value in found.items() if name not in theirs}
        found |= layer
    return preset({name: value for name, value in found.items() if name != "dataset"})


def configurations(folder: Path = FOLDER) -> list[tuple[str, str]]:
    """Data set and variant of each file, in the order of the file names."""
    found = [read_config(path) for path in sorted(folder.glob("*.toml"), key=lambda p: p.stem)]
    return [(config["dataset"], config["variant"]) for config in found]


def configuration(dataset: str, variant: str, folder: Path = FOLDER) -> Preset:
    """The options of one of them: what its file says, on the defaults of `Preset`.

    Raises:
        ValueError: there is none.
    """
    path = folder / f"{dataset}-{variant}.toml"
    if not path.is_file():
        known = ", ".join(f"{d}-{v}" for d, v in configurations(folder))
        raise ValueError(f"configuration: must be one of {known}, got {dataset}-{variant}.")
    return layered(read_config(path))


def usual_file(dataset: str, variant: str | None = None) -> Path:
    """The file that a data set and a variant train by, whatever else is given."""
    path = FOLDER / f"{dataset}-{variant or USUAL_VARIANT}.toml"
    return path if path.is_file() else FOLDER / f"{dataset}-{USUAL_VARIANT}.toml"
