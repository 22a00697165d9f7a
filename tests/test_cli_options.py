"""The options of `grand-fast train`: what each does, and one line for each that cannot be."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from grand_fast import cli
from grand_fast.data.datasets import DATASETS
from grand_fast.training.checkpoint import load_checkpoint
from grand_fast.training.configurations import configuration
from grand_fast.training.options import add_preset_options, preset_table
from grand_fast.training.presets import Preset, preset
from tests._command_line import QUICK, fails, own_folder  # noqa: F401  # a fixture


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--dataset", "cora2"],
            "--dataset: must be one of digits, Cora, CiteSeer, PubMed, Coauth",
        ),
        (
            ["--method", "rk45"],
            "--method: must be one of euler, midpoint, rk4, rk4_classic, dopri5",
        ),
        (
            ["--variant", "gcn"],
            "--variant: must be one of l, nl, nl-rw, laplacian, mixed, got 'gcn'",
        ),
        (["--split", "half"], "--split: must be one of planetoid, public, random, got 'half'"),
        (
            ["--split", "public"],
            "--split public needs a split that comes with the data, got digits",
        ),
        (["--backend", "tpu"], "--backend: must be one of auto, gpu, cpu, reference, got 'tpu'"),
        (["--device", "tpu"], "--device: must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--seeds", "0"], "--seeds: must be an integer at least 1, got '0'"),
        (["--epochs", "2.5"], "--epochs: must be an integer at least 1, got '2.5'"),
        (["--lr", "0"], "--lr: must be a number above 0, got '0'"),
        (["--T", "nan"], "--T: must be a number at least 0, got 'nan'"),
        (["--dropout", "1"], "--dropout: must be a number at least 0 and below 1, got '1'"),
        (["--heads", "3"], "`heads` must divide attention_channels=64, got 3"),
        (["--neighbours", "1797"], "`neighbours` must lie in [1, 1796], got 1797"),
        (["--labels-per-class", "60"], "`labels_per_class` must be at most"),
        (["--split", "planetoid"], "published for Cora, CiteSeer and PubMed, got digits"),
        (["--root", "."], "--root is not used by digits"),
        (["--dataset", "Cora", "--neighbours", "5"], "--neighbours builds the graph of digits"),
        (["--dataset", "Cora", "--labels-per-class", "5"], "needs --split random"),
        (["--method", "dopri5", "--step-size", "1"], "--step-size is not used by dopri5"),
        (["--tol-scale", "10"], "--tol-scale is not used by rk4, whose steps are --step-size"),
        (["--method", "bosh3", "--tol-scale", "10", "--rtol", "1e-3"], "give it alone"),
        (["--tol-scale-adjoint", "10"], "--tol-scale-adjoint needs --adjoint continuous"),
        (["--memory-limit", "1000", "--adjoint", "direct"], "needs --adjoint auto or checkpoint"),
        (["--memory-limit", "1000"], "`memory_limit` must be at least"),
        (["--method", "uniformisation"], "`term` must be linear"),
        (["--dataset", "Cora", "--development", "5"], "--development needs --split random, got"),
        (
            ["--variant", "laplacian", "--score", "gat"],
            "--score is of the attention, which --varia",
        ),
        (["--laplacian", "symmetric"], "--laplacian needs --variant laplacian or mixed, got nl"),
        (["--attention-threshold", "0.1"], "--attention-threshold needs --variant nl-rw or l, got"),
        (["--rewiring-top-k", "5"], "--rewiring-top-k needs --rewiring."),
        (
            ["--rewiring", "heat", "--rewiring-alpha", "0.1"],
            "--rewiring-alpha needs --rewiring ppr",
        ),
        (["--rewiring", "ppr", "--rewiring-t", "3"], "--rewiring-t needs --rewiring heat"),
        (["--rewiring", "ppr"], "`top_k` or `threshold` must be given, one of them, got neither"),
        (
            ["--score", "dot"],
            "--score: must be one of scaled_dot, cosine, pearson, exp_kernel, gat",
        ),
        (["--optimizer", "sgdd"], "--optimizer: must be one of adadelta, "),
        (
            ["--optimizer", "rprop"],
            "`weight_decay` must be 0 with Rprop, which has none, got 0.001",
        ),
        (["--augment", "-1"], "--augment: must be an integer at least 0, got '-1'"),
        (["--entropy-warmup", "5"], "--entropy-warmup needs --entropy above 0."),
        (["--early-stop", "0.5"], "--early-stop: must be a number at least 1, got '0.5'"),
        (["--patience", "0"], "--patience: must be an integer at least 1, got '0'"),
        (["--data", "g.npz", "--dataset", "Cora"], "--dataset is not used with --data"),
        (["--data", "g.npz", "--root", "."], "--root is not used with --data"),
        (["--config", "none.toml"], "--config: none.toml: No such file or directory."),
        (["--hiden", "5"], "unrecognized arguments: --hiden 5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(capsys, arguments, words):
    assert words in fails(capsys, ["train", *arguments], 2)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--score", "exp_kernel", "--normalizer", "squareplus", "--normalize", "sender",
         "--constant-init"],
        ["--variant", "nl-rw", "--attention-quantile", "0.3", "--augment", "2", "--no-source"],
        ["--variant", "l", "--attention-threshold", "0.01", "--batch-norm", "--mlp", "--fc-out"],
        ["--variant", "mixed", "--laplacian", "symmetric", "--use-labels", "--reweight"],
        ["--rewiring", "ppr", "--rewiring-top-k", "8", "--self-loops", "none"],
        ["--rewiring", "heat", "--rewiring-t", "2", "--rewiring-threshold", "0.02"],
        ["--kinetic", "0.1", "--jacobian", "0.01", "--early-stop", "2", "--patience", "1"],
        ["--entropy", "0.5", "--entropy-warmup", "2"],
        ["--max-nfe", "1000", "--optimizer", "AdamW", "--row-normalize", "--development", "500"],
    ],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_model_options(capsys, options):
    assert cli.main(["train", *QUICK, *options, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    names = [option[2:].replace("-", "_") for option in options if option.startswith("--")]
    for name in names:
        default = getattr(configuration("digits", "nl"), name.removeprefix("no_"))
        assert content["options"][name.removeprefix("no_")] != default or name == "no_source"
    model = load_checkpoint(f"runs/digits-{content['variant']}")
    assert sum(p.numel() for p in model.parameters()) == content["parameters"]


def test_an_option_may_be_set_to_nothing(capsys):
    assert cli.main(["train", *QUICK, "--self-loops", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["self_loops"] is None


CONFIG = """
# A comment
dataset = "digits"
variant = "l"
hidden = 8
heads = 2
attention_channels = 4
T = 1
epochs = 2
source = true
self_loops = "none"
method = "dopri5"
tol_scale = 1e4
"""


def test_config(capsys):
    Path("small.toml").write_text(CONFIG)
    options = ["--backend", "reference", "--config", "small.toml", "--json"]
    assert cli.main(["train", *options, "--hidden", "6", "--no-source"]) == 0
    chosen = json.loads(capsys.readouterr().out)["options"]
    assert (chosen["variant"], chosen["T"], chosen["epochs"]) == ("l", 1.0, 2)
    assert (chosen["hidden"], chosen["source"]) == (6, False)  # the command line wins
    assert chosen["self_loops"] is None
    assert chosen["labels_per_class"] == configuration("digits", "nl").labels_per_class

    assert cli.main(["train", *options, "--rtol", "0.1"]) == 0  # a pair instead of the scale
    chosen = json.loads(capsys.readouterr().out)["options"]
    assert (chosen["rtol"], chosen["tol_scale"]) == (0.1, None)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_config_with_a_byte_order_mark(capsys, line_end):
    Path("small.toml").write_bytes(("\ufeff" + CONFIG.replace("\n", line_end)).encode())
    options = ["--backend", "reference", "--config", "small.toml", "--json"]
    assert cli.main(["train", *options]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["hidden"] == 8


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hiden = 5", "small.toml: unknown key 'hiden'. Did you mean hidden?"),
        ("seeds = 5", "small.toml: seeds is given on the command line alone, by --seeds."),
        ("zzz = 5", "small.toml: unknown key 'zzz'. See grand-fast train --help."),
        ("hidden = 2.5", "small.toml: hidden must be an integer at least 1, got '2.5'."),
        ("hidden = [2]", "small.toml: hidden must be one value, got list."),
        ("source = 1", "small.toml: source must be true or false, got '1'."),
        ('dataset = "cora2"', "small.toml: dataset must be one of digits, Cora,"),
        ("hidden 5", "small.toml is not TOML: "),
    ],
)
def test_bad_config(capsys, line, words):
    Path("small.toml").write_text(line)
    assert words in fails(capsys, ["train", "--config", "small.toml"], 2)


def own_graph(**more):
    """Two cliques of ten nodes."""
    ids = np.arange(20)
    pairs = [(i, j) for i in ids for j in ids if i != j and i // 10 == j // 10]
    arrays = {"edge_index": np.array(pairs).T, "x": np.eye(20)[:, :5], "y": ids // 10}
    np.savez("mine.npz", **(arrays | more))


SPLIT = {"train": np.array([0, 10]), "val": np.array([1, 11]), "test": np.arange(12, 20)}
MASKS = {f"{name}_mask": np.isin(np.arange(20), ids) for name, ids in SPLIT.items()}
DRAWN = ["--development", "12", "--labels-per-class", "3"]


@pytest.mark.parametrize("kind", [bool, int])
def test_own_masks_decide_the_split(capsys, kind):
    """Of the weights too: they are those of the same split given as ids."""
    command = ["train", *QUICK, "--data", "mine.npz"]
    own_graph(**SPLIT)
    assert cli.main([*command, "--out", "ids"]) == 0
    capsys.readouterr()
    own_graph(**{name: mask.astype(kind) for name, mask in MASKS.items()})
    assert cli.main([*command, "--out", "masks"]) == 0
    out = capsys.readouterr().out
    assert "public split, 2 / 2 / 8 nodes" in out
    assert "split: train_mask, val_mask and test_mask of mine.npz\n" in out
    ids, masks = (Path(folder, "model.safetensors").read_bytes() for folder in ("ids", "masks"))
    assert ids == masks


def test_a_random_split_in_the_place_of_one_s_own_is_said(capsys):
    own_graph(**SPLIT)
    assert cli.main(["train", *QUICK, "--data", "mine.npz", "--split", "random", *DRAWN]) == 0
    out = capsys.readouterr().out
    assert "random split, 6 / 6 / 8 nodes" in out
    assert "split: train, val and test of mine.npz is not used: --split random\n" in out


@pytest.mark.parametrize(
    ("y", "names", "line"),
    [
        (np.arange(20) // 10, None, None),
        (np.arange(20) // 10 + 1, ["1", "2"], "classes: 1, 2 in y, trained as 0 to 1, in that ord"),
        (3_000_000 * (np.arange(20) // 10), ["0", "3000000"], "classes: 0, 3000000 in y, trained"),
        (np.where(np.arange(20) < 10, "dog", "cat"), ["cat", "dog"], "classes: cat, dog in y, tra"),
    ],
    ids=["0", "1", "large", "words"],
)
def test_as_many_classes_are_trained_as_there_are(capsys, y, names, line):
    own_graph(**SPLIT, y=y)
    assert cli.main(["train", *QUICK, "--data", "mine.npz", "--json"]) == 0
    out, err = capsys.readouterr()
    assert " 2 classes; public split" in err
    assert ("classes: " in err) == (line is not None) and (line or "") in err
    assert json.loads(out)["classes"] == names
    config = json.loads(Path("runs/mine-nl/config.json").read_text())
    assert config["classes"] == names and config["model"]["out_channels"] == 2


def test_classes_outside_the_component_are_not_trained(capsys):
    ring = np.stack([np.arange(15), np.roll(np.arange(15), 1)])
    y = np.repeat([5, 6, 7, 9], 5)  # of 9 no node lies in the ring
    own_graph(edge_index=np.concatenate([ring, ring[::-1]], axis=1), y=y)
    command = ["train", *QUICK, "--data", "mine.npz", "--component", "largest"]
    options = ["--development", "13", "--labels-per-class", "3"]
    assert cli.main([*command, *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "3 classes; random split, 9 / 4 / 2 nodes" in err
    assert json.loads(out)["classes"] == ["5", "6", "7"]


def test_what_is_not_read_of_one_s_own_is_said(capsys):
    own_graph(**SPLIT, edge_attr=np.ones((180, 2)), node_names=np.arange(20))
    assert cli.main(["train", *QUICK, "--data", "mine.npz"]) == 0
    assert "not used: edge_attr, node_names of mine\n" in capsys.readouterr().out


def test_own_graph(capsys):
    own_graph(train=np.array([0, 10]), val=np.array([1, 11]), test=np.arange(12, 20))
    assert cli.main(["train", *QUICK, "--data", "mine.npz", "--json"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert (content["dataset"], content["options"]["split"]) == ("mine", "public")
    assert "public split, 2 / 2 / 8 nodes" in err
    assert Path("runs/mine-nl/model.safetensors").is_file()


def test_rewiring_does_not_drop_weights(capsys):
    own_graph(edge_weight=np.ones(180))
    options = ["--development", "12", "--labels-per-class", "3", "--rewiring-top-k", "2"]
    command = ["train", *QUICK, "--data", "mine.npz", *options, "--rewiring", "ppr"]
    assert "--rewiring takes edges without weights, got mine" in fails(capsys, command, 2)


def test_a_component_without_a_part_of_the_split(capsys):
    own_graph(train=np.array([0, 10]), val=np.array([1, 2]), test=np.arange(12, 20))
    command = ["train", *QUICK, "--data", "mine.npz", "--component", "largest"]
    assert "hold nodes of each part of the split, got none for val." in fails(capsys, command, 2)


def test_own_graph_without_a_split(capsys):
    own_graph()
    command = ["train", *QUICK, "--data", "mine.npz"]
    line = fails(capsys, command, 2)
    assert "more nodes than that, got 20. Choose a smaller `development`. The options are " in line
    assert line.endswith("--labels-per-class and --development.\n")
    options = ["--development", "12", "--labels-per-class", "3"]
    assert cli.main([*command, *options]) == 0
    assert "random split, 6 / 6 / 8 nodes" in capsys.readouterr().out


def test_bad_own_graph(capsys):
    assert "mine.npz: no such file" in fails(capsys, ["train", "--data", "mine.npz"], 1)


def test_a_value_may_be_none():
    values = {"split": "public", "self_loops": "none"}
    assert preset(values) == Preset(split="public", self_loops=None)


def test_help_tells_configurations_as_options():
    parser = argparse.ArgumentParser()
    add_preset_options(parser)
    words = preset_table().split()
    assert "(default: rk4)" in parser.format_help()
    places = [words.index(name) for name in DATASETS]
    for name, start in zip(DATASETS, places, strict=True):
        end = next(i for i in range(start + 1, len(words)) if not words[i].startswith("--"))
        given = vars(parser.parse_args(words[start + 1 : end]))
        assert preset(given) == configuration(name, "nl")
    assert "nl-rw --attention-quantile=0.1" in " ".join(words)
