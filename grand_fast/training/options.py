"""The options of `grand-fast train` on the command line: flags, what they need, and the help."""

import argparse
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from grand_fast.data.datasets import DATASETS
from grand_fast.solvers import ADAPTIVE
from grand_fast.training.configurations import (
    FOLDER,
    USUAL_VARIANT,
    configuration,
    configurations,
    layered,
    read_config,
    usual_file,
)
from grand_fast.training.option_types import NONE, BadOptionError
from grand_fast.training.presets import OPTIONS, PARSERS, Preset

_HELP_WIDTH = 100


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

The data sets come with options of their own in place of the defaults above; those given win. They
stand in files, one for a data set and a variant, or that of nl where a variant has none:
"""


def add_preset_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each option; those not given are not in the parsed result."""
    groups: dict[str, Any] = {}
    for name, field in OPTIONS.items():
        title, parse = field.metadata["group"], PARSERS[name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        more: dict[str, Any] = {"help": field.metadata["help"], "default": argparse.SUPPRESS}
        if isinstance(field.default, bool):
            more["action"] = argparse.BooleanOptionalAction
            more["help"] += " (default)" if field.default else ""
        else:
            if field.default is not None:
                more["help"] += f" (default: {_text(field.default)})"
            more |= {"type": parse, "metavar": "|".join(getattr(parse, "names", ())) or "X"}
        groups[title].add_argument(flag_of(name), **more)


def flag_of(name: str) -> str:
    """The flag of an option: `step_size` → `--step-size`."""
    return "--" + name.replace("_", "-")


def choose(
    dataset: str | None, config: Mapping[str, Any], given: Mapping[str, Any], **defaults: object
) -> Preset:
    """The configuration of a data set (None: a graph of the user's), a file's options, those given.

    Raises:
        BadOptionError: an option is given that the others leave without effect.
    """
    own: Mapping[str, Any] = defaults
    if dataset is not None:
        variant = given.get("variant") or config.get("variant")
        own = read_config(usual_file(dataset, variant))
    chosen = layered(own, config, given)
    if unused := _unused(dataset, chosen, given.keys()):
        raise BadOptionError(unused)
    return chosen


def _unused(dataset: str | None, chosen: Preset, given: Collection[str]) -> str | None:
    """The first of the options given that would be silently ignored, and what it needs."""
    # Not the sizes, so that one command serves every variant
    attention = ("score", "normalizer", "normalize", "reweight", "constant_init")
    rewired = [name for name in OPTIONS if name.startswith("rewiring_")]
    adaptive = chosen.method in ADAPTIVE
    adams = chosen.method == "implicit_adams"
    solver = f"is not used by {chosen.method}"
    graph = dataset or "the graph of --data"
    rules: list[tuple[tuple[str, ...], bool, str]] = [
        (("neighbours",), dataset == "digits",
         f"builds the graph of digits; {graph} has edges of its own"),
        (tuple(rewired), chosen.rewiring is not None, "needs --rewiring"),
        (("rewiring_alpha",), chosen.rewiring != "heat", "needs --rewiring ppr"),
        (("rewiring_t",), chosen.rewiring != "ppr", "needs --rewiring heat"),
        (attention, chosen.variant != "laplacian",
         "is of the attention, which --variant laplacian has not"),
        (("step_size",), not adaptive, f"{solver}, which chooses its steps. Use --rtol"),
        (("rtol", "atol", "tol_scale"), adaptive or adams,
         f"{solver}, whose steps are --step-size"),
        (("entropy_warmup",), chosen.entropy > 0, "needs --entropy above 0"),
        (("tol_scale",), chosen.rtol is None and chosen.atol is None,
         "stands for --rtol and --atol: give it alone"),
    ]  # fmt: skip
    for name in given:
        if needs := OPTIONS[name].metadata["needs"]:
            other, *values = needs
            got = getattr(chosen, other)
            text = f"needs {flag_of(other)} {' or '.join(values)}, got {got}"
            rules.append(((name,), got in values, text))
    for names, holds, text in rules:
        for name in names:
            if name in given and not holds:
                return f"{flag_of(name)} {text}."
    return None


def preset_table() -> str:
    """What each data set's configuration changes of the defaults, as options, for `--help`.

    Of the other variants what they change of that.
    """
    rows = {name: (Preset(), configuration(name, USUAL_VARIANT)) for name in DATASETS}
    for name, variant in configurations():
        if variant != USUAL_VARIANT:
            rows[f"{name} {variant}"] = (rows[name][1], configuration(name, variant))
    lines = []
    for title, (base, values) in rows.items():
        changed = [
            _as_option(name, value)
            for name, value in values.options().items()
            if value != getattr(base, name) and not (name == "variant" and " " in title)
        ]
        if changed:
            lines += textwrap.wrap(
                " ".join(changed),
                _HELP_WIDTH,
                initial_indent=f"  {title:<18}",
                subsequent_indent=" " * 20,
                break_on_hyphens=False,
            )
    return "\n".join([f"  {FOLDER}/", *lines])


def _as_option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_of(name if value else f"no_{name}")
    return f"{flag_of(name)}={_text(value)}"


def _text(value: Any) -> str:
    """As it is given on the command line."""
    return NONE if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)
