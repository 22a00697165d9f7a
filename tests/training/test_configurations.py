"""The configurations of the data sets: each is whole, is trained by, and comes with the package."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.paper.published import FEATURES_CLASSES
from grand_fast import cli
from grand_fast.data.datasets import DATASETS, NodeData
from grand_fast.nn import GRAND
from grand_fast.solvers import ADAPTIVE
from grand_fast.training.configurations import (
    FOLDER,
    RELEASED,
    configuration,
    configurations,
    read_config,
    usual_file,
)
from grand_fast.training.options import choose
from grand_fast.training.presets import OPTIONS, PARSERS, Preset, model_config
from tests._command_line import QUICK, fails, own_folder  # noqa: F401  # a fixture

ROOT = Path(__file__).resolve().parents[2]
SIZES = FEATURES_CLASSES | {"digits": (64, 10)}
EVERY = [(d, v, folder) for folder in (FOLDER, RELEASED) for d, v in configurations(folder)]
IDS = [f"{folder.name}-{d}-{v}" for d, v, folder in EVERY]


def test_there_is_one_for_each_data_set_and_variant():
    published = {(d, v) for d in FEATURES_CLASSES for v in ("l", "nl", "nl-rw")}
    assert set(configurations()) == published | {("digits", "nl")}
    assert {dataset for dataset, _ in configurations()} == set(DATASETS)


@pytest.mark.parametrize(("dataset", "variant", "folder"), EVERY, ids=IDS)
def test_builds(dataset, variant, folder):
    preset = configuration(dataset, variant, folder)
    assert preset.variant == variant
    features, classes = SIZES[dataset]
    data = NodeData(dataset, torch.zeros(1, features), torch.tensor([classes - 1]),
                    torch.zeros(2, 0, dtype=torch.int64))  # fmt: skip
    model = GRAND(**model_config(data, preset))
    assert (model.out_channels, model.T) == (classes, preset.T)


@pytest.mark.parametrize(("dataset", "variant", "folder"), EVERY, ids=IDS)
def test_is_whole(dataset, variant, folder):
    """Laid upon that of its data set, as `grand-fast train --config` does, it is the same."""
    options = read_config(folder / f"{dataset}-{variant}.toml")
    got, want = choose(dataset, options, {}), configuration(dataset, variant, folder)
    if want.method in ADAPTIVE:  # which does not read it
        got = replace(got, step_size=want.step_size)
    assert got == want


def test_unknown():
    with pytest.raises(ValueError, match="must be one of CiteSeer-l, .*, got Cora-mixed"):
        configuration("Cora", "mixed")


@pytest.mark.parametrize(("dataset", "variant"), configurations())
def test_a_data_set_trains_by_its_own(dataset, variant):
    assert choose(dataset, {}, {"variant": variant}) == configuration(dataset, variant)
    assert choose(dataset, {"variant": variant}, {}) == configuration(dataset, variant)
    assert usual_file(dataset, variant) == FOLDER / f"{dataset}-{variant}.toml"


@pytest.mark.parametrize("table", ["table1", "table2"])
def test_they_are_those_of_the_published_tables(table):
    runs = json.loads((ROOT / "bench" / "results" / "paper" / f"{table}.json").read_text())["runs"]
    found = {(r["dataset"], r["model"].removeprefix("GRAND-")): r["options"] for r in runs
             if r["model"].startswith("GRAND-")}  # fmt: skip
    assert len(found) == 9
    for (dataset, variant), options in found.items():
        trained = choose(dataset, {}, {"variant": variant}).options()
        assert trained == Preset().options() | options


def test_a_variant_without_a_file_trains_by_that_of_nl():
    want = replace(configuration("Photo", "nl"), variant="laplacian")
    assert choose("Photo", {}, {"variant": "laplacian"}) == want
    assert choose("Photo", {}, {}) == configuration("Photo", "nl")
    assert usual_file("Photo", "laplacian") == FOLDER / "Photo-nl.toml"
    assert choose(None, {}, {}, split="public") == Preset(split="public")


def test_files_win_over_it_and_flags_over_both():
    config = {"T": 2.0, "dropout": 0.25}
    chosen = choose("Photo", config, {"T": 1.0})
    assert chosen == replace(configuration("Photo", "nl"), T=1.0, dropout=0.25)


@pytest.mark.parametrize("by", ["config", "given"])
def test_what_stands_for_another_takes_its_place(by):
    def chosen(dataset, **options):
        layers = {"config": {}, "given": {}} | {by: options}
        return choose(dataset, layers["config"], layers["given"])

    thinned = chosen("Cora", variant="nl-rw", attention_threshold=0.1)
    assert (thinned.attention_threshold, thinned.attention_quantile) == (0.1, None)
    assert chosen("Cora", variant="nl-rw").attention_quantile == 0.03
    rewired = chosen("CiteSeer", variant="nl-rw", rewiring_threshold=0.01)
    assert (rewired.rewiring_threshold, rewired.rewiring_top_k) == (0.01, None)


@pytest.mark.parametrize("config", [False, True])
def test_a_run_says_which_it_used(capsys, config):
    Path("mine.toml").write_text("hidden = 6\nheads = 1\n")
    more = ["--config", "mine.toml"] if config else []
    assert cli.main(["train", *QUICK, *more, "--json", "out.json"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    own = f"configuration: {FOLDER / 'digits-nl.toml'}"
    assert first == (f"{own}, and over it mine.toml" if config else own)
    assert json.loads(Path("out.json").read_text())["options"]["hidden"] == 8  # the flag's


def test_a_missing_data_set_is_still_one_line(capsys):
    assert "Photo" in fails(capsys, ["train", "--dataset", "Photo", "--root", "nowhere"], 1)


def test_every_option_is_declared_once_for_both():
    """A file reads what the command line reads, and no option lacks its help or its parser."""
    assert set(PARSERS) == set(OPTIONS)
    assert all(field.metadata["help"] and field.metadata["group"] for field in OPTIONS.values())
    assert {"max_nfe", "memory_limit", "heads", "normalize", "epochs"} <= set(OPTIONS)
    assert not {"regularizers", "tol_convention", "mix_features"} & set(OPTIONS)


ORDER = "split labels_per_class development component row_normalize neighbours self_loops rewiring \
rewiring_top_k rewiring_threshold rewiring_alpha rewiring_t variant hidden heads \
attention_channels score normalizer normalize reweight laplacian attention_threshold \
attention_quantile source augment batch_norm encoder_channels mlp fc_out degree_scaling decoder \
use_labels constant_init dropout input_dropout method T step_size rtol atol tol_scale adjoint \
tol_scale_adjoint memory_limit max_nfe kinetic jacobian early_stop entropy entropy_warmup epochs \
patience select optimizer lr weight_decay"


def test_files_of_runs_hold_the_options_in_their_old_order():
    assert list(Preset().options()) == ORDER.split()


def test_the_package_holds_every_file():
    code = (
        "from setuptools import Distribution\n"
        "d = Distribution(); d.parse_config_files(); d.include_package_data = False\n"
        "build = d.get_command_obj('build_py'); build.ensure_finalized()\n"
        "print(*(f'{f[0]}/{name}' for f in build.data_files for name in f[3]), sep='\\n')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    packed = {line.partition("/")[2] for line in out if "configurations/" in line}
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.toml")}
    assert packed == files and len(files) == len(EVERY)
