"""The options of `grand-fast train`: from the command line, a TOML file, and the presets."""

from __future__ import annotations

import argparse
import difflib
import textwrap
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from grand_fast.data.datasets import DATASETS
from grand_fast.solvers import ADAPTIVE
from grand_fast.training.option_types import NONE, BadOptionError, one_of
from grand_fast.training.presets import PRESETS, Preset, preset

_FIELDS: dict[str, Field[Any]] = {field.name: field for field in fields(Preset)}
_HELP_WIDTH = 100
# Of one call, not of what it trains
_COMMAND_LINE = ("seeds", "root", "data", "config", "backend", "device", "out", "restart", "json")


EXAMPLES = """\
examples:
  grand-fast train
      handwritten digits, built in: half a minute on two cores, no download
  grand-fast train --dataset Cora --root ~/data --variant l --split planetoid --seeds 3 --json
      Cora as PyG's loaders keep it, ~/data/planetoid/Cora/raw or ~/data/Cora/raw
  grand-fast train --data graph.npz --hidden 32 --out runs/mine
      your own graph, written by numpy.savez("graph.npz", edge_index=..., x=..., y=...); where
      no split is given, a small one needs a smaller --development and --labels-per-class
  grand-fast train --config tuned.toml --seeds 20
      options from a file, one a line, with _ for -: hidden = 80, step_size = 0.5, source = false
The word none sets an option to nothing: --self-loops none.

The data sets come with options of their own in place of the defaults above; those given win:
"""


def add_preset_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `Preset`; those not given are not in the parsed result."""
    groups: dict[str, Any] = {}
    for field in _FIELDS.values():
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        parse, text = field.metadata["parse"], field.metadata["help"]
        more: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if field.type == "bool":
            more["action"] = argparse.BooleanOptionalAction
            more["help"] += " (default)" if field.default else ""
        else:
            if field.default is not None:
                more["help"] += f" (default: {_text(field.default)})"
            more |= {"type": parse, "metavar": "|".join(getattr(parse, "names", ())) or "X"}
        groups[title].add_argument(flag_of(field.name), **more)


def flag_of(name: str) -> str:
    """`step_size` → `--step-size`."""
    return "--" + name.replace("_", "-")


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Preset` that the command line gave."""
    return {name: value for name, value in vars(options).items() if name in _FIELDS}


def read_config(path: Path) -> dict[str, Any]:
    """The fields of `Preset`, and perhaps `dataset`, that a TOML file gives.

    Raises:
        BadOptionError: names the file, the key, what was expected and what came.
    """
    try:
        # With a byte-order mark, as some editors write, or without
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadOptionError(f"--config: {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadOptionError(f"--config: {path} is not TOML: {error}.") from error
    return {name: _read_value(path, name, value) for name, value in content.items()}


def _read_value(path: Path, name: str, value: Any) -> Any:
    if name == "dataset":
        parse = one_of(DATASETS)
    elif name in _FIELDS:
        parse = _FIELDS[name].metadata["parse"]
    elif name in _COMMAND_LINE:
        raise BadOptionError(
            f"--config: {path}: {name} is given on the command line alone, by {flag_of(name)}."
        )
    else:
        near = difflib.get_close_matches(name, ["dataset", *_FIELDS], n=1)
        meant = f" Did you mean {near[0]}?" if near else " See grand-fast train --help."
        raise BadOptionError(f"--config: {path}: unknown key {name!r}.{meant}")
    try:
        if not isinstance(value, bool | int | float | str):
            raise argparse.ArgumentTypeError(f"must be one value, got {type(value).__name__}")
        return parse(str(value))
    except argparse.ArgumentTypeError as error:
        raise BadOptionError(f"--config: {path}: {name} {error}.") from error


def choose(
    dataset: str | None, config: Mapping[str, Any], given: Mapping[str, Any], **defaults: object
) -> Preset:
    """The preset of a data set (None: a graph of the user's), a file's options, then those given.

    Raises:
        BadOptionError: an option is given that the others leave without effect.
    """
    config = {name: value for name, value in config.items() if name != "dataset"}
    # Tolerances come as a pair or as a scale; the command line's take the place of the file's
    pair, scale = {"rtol", "atol"}, {"tol_scale"}
    for ours, theirs in ((pair, scale), (scale, pair)):
        if ours & given.keys() and not theirs & given.keys():
            config = {name: value for name, value in config.items() if name not in theirs}
    chosen = preset(dataset, **{**defaults, **config, **given})
    if unused := _unused(dataset, chosen, given.keys()):
        raise BadOptionError(unused)
    return chosen


def _unused(dataset: str | None, chosen: Preset, given: Collection[str]) -> str | None:
    """The first of the options given that would be silently ignored, and what it needs."""
    # Not the sizes, so that one command serves every variant
    attention = ("score", "normalizer", "normalize", "reweight", "constant_init")
    thinning = ("attention_threshold", "attention_quantile")
    rewired = [name for name in _FIELDS if name.startswith("rewiring_")]
    adaptive = chosen.method in ADAPTIVE
    adams = chosen.method == "implicit_adams"
    solver = f"is not used by {chosen.method}"
    graph = dataset or "the graph of --data"
    rules: list[tuple[tuple[str, ...], bool, str]] = [
        (("neighbours",), dataset == "digits",
         f"builds the graph of digits; {graph} has edges of its own"),
        (("labels_per_class", "development"), chosen.split == "random",
         f"needs --split random, got --split {chosen.split}"),
        (tuple(rewired), chosen.rewiring is not None, "needs --rewiring"),
        (("rewiring_alpha",), chosen.rewiring != "heat", "needs --rewiring ppr"),
        (("rewiring_t",), chosen.rewiring != "ppr", "needs --rewiring heat"),
        (attention, chosen.variant != "laplacian",
         "is of the attention, which --variant laplacian has not"),
        (("laplacian",), chosen.variant in ("laplacian", "mixed"),
         f"needs --variant laplacian or mixed, got {chosen.variant}"),
        (thinning, chosen.variant in ("l", "nl-rw"),
         f"needs --variant nl-rw or l, got {chosen.variant}"),
        (("step_size",), not adaptive, f"{solver}, which chooses its steps. Use --rtol"),
        (("rtol", "atol", "tol_scale"), adaptive or adams,
         f"{solver}, whose steps are --step-size"),
        (("tol_scale_adjoint",), chosen.adjoint == "continuous", "needs --adjoint continuous"),
        (("memory_limit",), chosen.adjoint == "checkpoint",
         f"needs --adjoint checkpoint, got --adjoint {chosen.adjoint}"),
        (("entropy_warmup",), chosen.entropy > 0, "needs --entropy above 0"),
        (("tol_scale",), chosen.rtol is None and chosen.atol is None,
         "stands for --rtol and --atol: give it alone"),
    ]  # fmt: skip
    for names, holds, text in rules:
        for name in names:
            if name in given and not holds:
                return f"{flag_of(name)} {text}."
    return None


def preset_table() -> str:
    """What each data set's preset changes of the defaults, as options, for `--help`."""
    lines = []
    for name, values in PRESETS.items():
        changed = [
            _as_option(field, getattr(values, field.name))
            for field in _FIELDS.values()
            if getattr(values, field.name) != field.default
        ]
        lines += textwrap.wrap(
            " ".join(changed),
            _HELP_WIDTH,
            initial_indent=f"  {name:<12}",
            subsequent_indent=" " * 14,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _as_option(field: Field[Any], value: Any) -> str:
    if isinstance(value, bool):
        return flag_of(field.name if value else f"no_{field.name}")
    return f"{flag_of(field.name)}={_text(value)}"


def _text(value: Any) -> str:
    """As it is given on the command line."""
    return NONE if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)
